//! Where a module lies: a path or a file URL in, a path out.
#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::error::shown;

/// Why a `module` cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum ModuleError {
    #[error("must not be empty")]
    Empty,
    #[error("must not contain a NUL byte")]
    Nul,
    #[error(
        "\"{scheme}://\" is not supported, because Conclave reaches no network: save the module \
         as a file and give its path or file:// URL"
    )]
    Remote { scheme: String },
    #[error("a file URL is written file:///absolute/path")]
    NotAbsoluteFileUrl,
    #[error("a file URL takes no query and no fragment; write \"?\" as %3F and \"#\" as %23")]
    FileUrlSuffix,
}

/// The file that `written` names. A relative path starts at the directory of the
/// configuration file.
///
/// # Errors
///
/// The text names no file.
pub(crate) fn module_path(config: &Path, written: &str) -> Result<PathBuf, ModuleError> {
    if written.is_empty() {
        return Err(ModuleError::Empty);
    }
    if written.contains('\0') {
        return Err(ModuleError::Nul);
    }
    if let Some((scheme, rest)) = written.split_once(':')
        && is_scheme(scheme)
    {
        if scheme.eq_ignore_ascii_case("file") {
            return file_url_path(rest);
        }
        if rest.starts_with("//") {
            let scheme = shown(scheme);
            return Err(ModuleError::Remote { scheme });
        }
    }
    // A name with a colon, such as `policy:v1.wasm`, is still a path.
    Ok(match config.parent() {
        Some(directory) => directory.join(written),
        None => PathBuf::from(written),
    })
}

/// Whether `text` can be the scheme of a URL (RFC 3986, section 3.1).
fn is_scheme(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.'))
}

/// The path in the part of a file URL after `file:` (RFC 8089; the host is empty or
/// `localhost`).
fn file_url_path(rest: &str) -> Result<PathBuf, ModuleError> {
    let (host, path) = rest
        .strip_prefix("//")
        .and_then(|rest| rest.split_at_checked(rest.find('/')?))
        .ok_or(ModuleError::NotAbsoluteFileUrl)?;
    if !host.is_empty() && !host.eq_ignore_ascii_case("localhost") {
        return Err(ModuleError::NotAbsoluteFileUrl);
    }
    if path.contains(['?', '#']) {
        return Err(ModuleError::FileUrlSuffix);
    }
    let bytes: Vec<u8> = percent_encoding::percent_decode_str(path).collect();
    if bytes.contains(&0) {
        return Err(ModuleError::Nul);
    }
    Ok(PathBuf::from(OsStr::from_bytes(&bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;
    use crate::config::tests::{read, refusal};

    fn module(written: &str) -> PathBuf {
        let text = serde_json::json!({"p": {"module": written}}).to_string();
        read(&text).unwrap().remove(0).module
    }

    fn module_refusal(written: &str) -> String {
        refusal(&serde_json::json!({"p": {"module": written}}).to_string())
    }

    #[test]
    fn relative_modules_start_at_the_configurations_directory() {
        assert_eq!(module("a.wasm"), Path::new("conf/a.wasm"));
        assert_eq!(module("sub/../a.wasm"), Path::new("conf/sub/../a.wasm"));
        assert_eq!(module("/abs/a.wasm"), Path::new("/abs/a.wasm"));
        assert_eq!(module("odd:name%20.wasm"), Path::new("conf/odd:name%20.wasm"));
        assert_eq!(module("dir/a://b"), Path::new("conf/dir/a://b"));

        let policies = parse(Path::new("policies.yml"), "p: {module: a.wasm}").unwrap();
        assert_eq!(policies[0].module, Path::new("a.wasm"));
        let policies = parse(Path::new("/etc/c/policies.yml"), "p: {module: a.wasm}").unwrap();
        assert_eq!(policies[0].module, Path::new("/etc/c/a.wasm"));
    }

    #[test]
    fn file_urls_are_decoded() {
        assert_eq!(module("file:///abs/a.wasm"), Path::new("/abs/a.wasm"));
        assert_eq!(module("FILE:///abs/a.wasm"), Path::new("/abs/a.wasm"));
        assert_eq!(module("file://localhost/a.wasm"), Path::new("/a.wasm"));
        assert_eq!(module("file:///a%20b%2Fc%3F.wasm"), Path::new("/a b/c?.wasm"));
        assert_eq!(module("file:///%zz%"), Path::new("/%zz%"));
        let not_utf8 = module("file:///%ff");
        assert_eq!(not_utf8.as_os_str().as_bytes(), b"/\xff");
    }

    #[test]
    fn malformed_modules_are_refused() {
        for url in ["file:a.wasm", "file:/a.wasm", "file://", "file://a.wasm", "file://host/a"] {
            let message = module_refusal(url);
            assert!(message.ends_with("is written file:///absolute/path"), "{message}");
        }
        for url in ["file:///a?b", "file:///a#b"] {
            assert!(module_refusal(url).contains("no query and no fragment"), "{url}");
        }
        assert!(module_refusal("").ends_with("module: must not be empty"));
        for nul in ["a\0b", "file:///a%00b"] {
            assert!(module_refusal(nul).ends_with("must not contain a NUL byte"));
        }
    }

    #[test]
    fn modules_from_the_network_are_refused_without_repeating_the_url() {
        for scheme in ["registry", "http", "https", "oci", "s3", "git+ssh", "HTTPS"] {
            let message = module_refusal(&format!("{scheme}://user:secret@example.com/p:v1"));
            assert!(
                message.ends_with(&format!(
                    "policy \"p\": module: \"{scheme}://\" is not supported, because Conclave \
                     reaches no network: save the module as a file and give its path or file:// \
                     URL"
                )),
                "{message}"
            );
        }
    }
}
