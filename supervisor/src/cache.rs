//! Native code on disk across restarts.
//!
//! An entry is named after everything that the code depends on: the module, and the
//! worker program that compiled it (which holds the engine, its settings and this very
//! format). It is read only if the directory belongs to the daemon's user alone, checked
//! against its checksum, and goes to a worker that is locked up before it maps it; so a
//! bad entry costs a compilation, not a promise.
//!
//! ```text
//! magic  16 bytes   "conclave code 2\n"
//! check  32 bytes   SHA-256 of the name and of all that follows
//! facts   3 bytes   shape of the module, whether instantiation runs guest code, what keeps
//!                   an instance from being set back
//! length  4 bytes   of the metadata plus one, little-endian; 0 if there is none
//! metadata, code
//! ```
#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use conclave_ipc::limits::{CODE_BYTES_MAX, METADATA_BYTES_MAX};
use conclave_ipc::message::{ModuleFacts, ModuleShape, Obstacle};
use nix::unistd::geteuid;
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::code::Code;
use crate::config::Sha256Digest;
use crate::image::{Draft, Image};

const MAGIC: &[u8; 16] = b"conclave code 2\n";

/// The facts and the length of the metadata.
const FACTS_BYTES: usize = 7;

/// What is copied at a time.
const CHUNK_BYTES: usize = 64 << 10;

/// Why an entry is of no use.
#[derive(Debug, Error)]
pub(crate) enum CacheError {
    /// The directory is not the daemon's alone.
    #[error("{} can't hold the cache: {what}", .path.display())]
    Shared {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The entry is not what was written.
    #[error("cache entry is damaged: {0}")]
    Damaged(&'static str),
    /// Reading or writing failed.
    #[error("cache can't be used: {0}")]
    Io(io::Error),
}

impl From<io::Error> for CacheError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// A directory of native code that belongs to the daemon's user alone.
#[derive(Debug)]
pub(crate) struct Cache {
    directory: PathBuf,
    build: [u8; 32],
}

impl Cache {
    /// Opens or makes the directory. `program` is the worker's, read to its end.
    ///
    /// # Errors
    /// The directory is reachable for others, or belongs to another user.
    pub(crate) fn open(directory: &Path, program: impl Read) -> Result<Self, CacheError> {
        match DirBuilder::new().mode(0o700).recursive(true).create(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
            Ok(()) | Err(_) => {}
        }
        // Behind a link, too: systemd gives dynamic users their directory as one.
        let metadata = fs::metadata(directory)?;
        let shared = |what: String| CacheError::Shared { path: directory.to_owned(), what };
        if !metadata.is_dir() {
            return Err(shared("it is not a directory".to_owned()));
        }
        if metadata.uid() != geteuid().as_raw() {
            return Err(shared(format!(
                "it belongs to user {}, not to {}",
                metadata.uid(),
                geteuid()
            )));
        }
        if metadata.mode() & 0o077 != 0 {
            return Err(shared(format!("its mode is {:03o}, not 700", metadata.mode() & 0o777)));
        }
        Ok(Self { directory: directory.to_owned(), build: hash_of(program)? })
    }

    fn path(&self, module: &Sha256Digest) -> PathBuf {
        self.directory.join(hex(&self.name(module)))
    }

    fn name(&self, module: &Sha256Digest) -> [u8; 32] {
        Sha256::new().chain_update(self.build).chain_update(module.to_string()).finalize().into()
    }

    /// The code for that module, if there is an entry.
    ///
    /// # Errors
    /// There is one and it is of no use.
    pub(crate) fn read(&self, module: &Sha256Digest) -> Result<Option<Code>, CacheError> {
        let mut file = match File::open(self.path(module)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let (mut magic, mut check, mut facts) = ([0; 16], [0; 32], [0; FACTS_BYTES]);
        let head = file
            .read_exact(&mut magic)
            .and_then(|()| file.read_exact(&mut check))
            .and_then(|()| file.read_exact(&mut facts));
        if head.is_err() || &magic != MAGIC {
            return Err(CacheError::Damaged("its beginning"));
        }
        let mut hash = Sha256::new().chain_update(self.name(module)).chain_update(facts);
        let (facts, metadata_bytes) =
            decode_facts(facts).ok_or(CacheError::Damaged("its facts"))?;
        let metadata = match metadata_bytes {
            Some(length) => {
                let mut metadata = vec![0; length];
                file.read_exact(&mut metadata).map_err(cut_short)?;
                hash.update(&metadata);
                Some(metadata)
            }
            None => None,
        };
        let image = copy_code(&mut file, &mut hash)?;
        if <[u8; 32]>::from(hash.finalize()) != check {
            return Err(CacheError::Damaged("its checksum"));
        }
        Ok(Some(Code { image, metadata, facts, from_cache: true }))
    }

    /// Keeps the code for that module.
    ///
    /// # Errors
    /// The disk is full, or alike; no half-written entry stays.
    pub(crate) fn write(&self, module: &Sha256Digest, code: &Code) -> Result<(), CacheError> {
        let facts = encode_facts(code.facts, code.metadata.as_deref());
        let mut hash = Sha256::new().chain_update(self.name(module)).chain_update(facts);
        let metadata = code.metadata.as_deref().unwrap_or_default();
        hash.update(metadata);
        let mut bytes = Vec::with_capacity(usize::try_from(code.image.length).unwrap_or_default());
        code.image.reader()?.read_to_end(&mut bytes)?;
        hash.update(&bytes);
        let check: [u8; 32] = hash.finalize().into();

        let path = self.path(module);
        let draft = path.with_extension(format!("{}.new", std::process::id()));
        let written = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&draft)
            .and_then(|mut file| {
                for part in [MAGIC.as_slice(), &check, &facts, metadata, &bytes] {
                    file.write_all(part)?;
                }
                file.sync_all()
            })
            .and_then(|()| fs::rename(&draft, &path));
        if written.is_err() {
            // The error to report is the one above.
            drop(fs::remove_file(&draft));
        }
        Ok(written?)
    }

    /// Forgets the code for that module.
    pub(crate) fn forget(&self, module: &Sha256Digest) {
        if let Err(error) = fs::remove_file(self.path(module)) {
            tracing::warn!(%error, "cache entry can't be removed");
        }
    }
}

fn cut_short(_: io::Error) -> CacheError {
    CacheError::Damaged("it is cut short")
}

fn hash_of(mut reader: impl Read) -> io::Result<[u8; 32]> {
    let mut hash = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match reader.read(&mut chunk)? {
            0 => return Ok(hash.finalize().into()),
            read => hash.update(chunk.get(..read).unwrap_or_default()),
        }
    }
}

fn copy_code(file: &mut File, hash: &mut Sha256) -> Result<Image, CacheError> {
    let mut draft = Draft::new()?;
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut code = file.take(CODE_BYTES_MAX);
    loop {
        match code.read(&mut chunk)? {
            0 => return Ok(draft.seal()?),
            read => {
                let bytes = chunk.get(..read).unwrap_or_default();
                hash.update(bytes);
                draft.write_all(bytes)?;
            }
        }
    }
}

fn encode_facts(facts: ModuleFacts, metadata: Option<&[u8]>) -> [u8; FACTS_BYTES] {
    let shape = match facts.shape {
        ModuleShape::Unknown => 0,
        ModuleShape::Wapc => 1,
        ModuleShape::Wasi => 2,
        ModuleShape::Rego => 3,
    };
    let obstacle = match facts.obstacle {
        None => 0,
        Some(Obstacle::Memory) => 1,
        Some(Obstacle::Table) => 2,
        Some(Obstacle::Segment) => 3,
        Some(Obstacle::Global) => 4,
        Some(Obstacle::Name) => 5,
        Some(Obstacle::Exit) => 6,
    };
    let length = metadata.map_or(0, |bytes| bytes.len().saturating_add(1));
    let [a, b, c, d] = u32::try_from(length).unwrap_or_default().to_le_bytes();
    [shape, u8::from(facts.runs_at_instantiation), obstacle, a, b, c, d]
}

fn decode_facts(bytes: [u8; FACTS_BYTES]) -> Option<(ModuleFacts, Option<usize>)> {
    let [shape, runs, obstacle, a, b, c, d] = bytes;
    let shape = match shape {
        0 => ModuleShape::Unknown,
        1 => ModuleShape::Wapc,
        2 => ModuleShape::Wasi,
        3 => ModuleShape::Rego,
        _ => return None,
    };
    let obstacle = match obstacle {
        0 => None,
        1 => Some(Obstacle::Memory),
        2 => Some(Obstacle::Table),
        3 => Some(Obstacle::Segment),
        4 => Some(Obstacle::Global),
        5 => Some(Obstacle::Name),
        6 => Some(Obstacle::Exit),
        _ => return None,
    };
    let length = usize::try_from(u32::from_le_bytes([a, b, c, d])).ok()?.checked_sub(1);
    if length.is_some_and(|length| length > METADATA_BYTES_MAX) {
        return None;
    }
    Some((ModuleFacts { shape, runs_at_instantiation: runs != 0, obstacle }, length))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn code() -> Code {
        Code {
            image: Image::of(b"native code").unwrap(),
            metadata: Some(b"{}".to_vec()),
            facts: ModuleFacts {
                shape: ModuleShape::Wapc,
                runs_at_instantiation: true,
                obstacle: Some(Obstacle::Table),
            },
            from_cache: false,
        }
    }

    fn cache(directory: &Path) -> Cache {
        Cache::open(&directory.join("cache"), b"program".as_slice()).unwrap()
    }

    #[test]
    fn what_is_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let module = Sha256Digest::of(b"module");
        assert!(cache(directory.path()).read(&module).unwrap().is_none());
        cache(directory.path()).write(&module, &code()).unwrap();
        let read = cache(directory.path()).read(&module).unwrap().unwrap();
        assert_eq!((read.metadata, read.facts), (Some(b"{}".to_vec()), code().facts));
        let mut bytes = Vec::new();
        read.image.reader().unwrap().read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"native code");
    }

    #[test]
    fn facts_are_read_as_they_were_written() {
        let mut read = 0;
        for (shape, runs, obstacle) in (0..=u8::MAX).flat_map(|n| [(n, 0, 0), (0, 1, n), (1, 0, n)])
        {
            let bytes = [shape, runs, obstacle, 3, 0, 0, 0];
            let Some((facts, length)) = decode_facts(bytes) else { continue };
            assert_eq!(length, Some(2));
            assert_eq!(encode_facts(facts, Some(b"{}")), bytes);
            read += 1;
        }
        // Four shapes, and twice no obstacle or one of six.
        assert_eq!(read, 4 + 7 + 7);
    }

    #[test]
    fn another_program_or_module_finds_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let module = Sha256Digest::of(b"module");
        cache(directory.path()).write(&module, &code()).unwrap();
        let other = Cache::open(&directory.path().join("cache"), b"other".as_slice()).unwrap();
        assert!(other.read(&module).unwrap().is_none());
        assert!(cache(directory.path()).read(&Sha256Digest::of(b"other")).unwrap().is_none());
    }

    #[test]
    fn every_single_changed_byte_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let module = Sha256Digest::of(b"module");
        let cache = cache(directory.path());
        cache.write(&module, &code()).unwrap();
        let path = cache.path(&module);
        let good = fs::read(&path).unwrap();
        for index in 0..good.len() {
            let mut bad = good.clone();
            bad[index] ^= 0x40;
            fs::write(&path, &bad).unwrap();
            assert!(matches!(cache.read(&module), Err(CacheError::Damaged(_))), "byte {index}");
        }
        for length in 0..good.len() {
            fs::write(&path, &good[..length]).unwrap();
            assert!(matches!(cache.read(&module), Err(CacheError::Damaged(_))), "length {length}");
        }
    }

    #[test]
    fn an_entry_under_another_name_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (one, two) = (Sha256Digest::of(b"one"), Sha256Digest::of(b"two"));
        let cache = cache(directory.path());
        cache.write(&one, &code()).unwrap();
        fs::rename(cache.path(&one), cache.path(&two)).unwrap();
        assert!(matches!(cache.read(&two), Err(CacheError::Damaged("its checksum"))));
    }

    #[test]
    fn a_directory_that_others_can_reach_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o750)).unwrap();
        let error = Cache::open(directory.path(), b"".as_slice()).unwrap_err();
        assert!(error.to_string().contains("its mode is 750, not 700"), "{error}");
    }
}
