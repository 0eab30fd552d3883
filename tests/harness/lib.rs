//! What the suites share: the binaries, a daemon in a directory of its own, and a client.
//!
//! The daemon is tested from outside, as processes. As root the tests let it drop to
//! `nobody`, so everything that it has to reach lies in a directory that `nobody` owns.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test harness fails by panicking"
)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, chown, geteuid};
use serde_json::Value;
use tempfile::TempDir;

/// How long anything in a test may take before the test fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How much of a line of the log is shown when a test fails.
const SHOWN_BYTES_MAX: usize = 1000;

/// The directory of the built test policies.
#[must_use]
pub fn policies() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("policies/built")
}

/// One of the test requests.
#[must_use]
pub fn request(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies/requests").join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The program under test. `cargo test` does not build the binaries of other packages, so
/// the first caller does.
#[must_use]
pub fn conclave() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(build_binaries).clone()
}

fn build_binaries() -> PathBuf {
    // target/PROFILE/deps/SUITE-HASH
    let suite = std::env::current_exe().unwrap();
    let directory = suite.parent().and_then(Path::parent).unwrap().to_owned();
    let release = directory.ends_with("release");
    if std::env::var_os("CONCLAVE_TESTS_PREBUILT").is_some() {
        // For a user who may run what another has built.
        return directory.join("conclave");
    }
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--workspace", "--bins"])
        .args(release.then_some("--release"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .expect("cargo can be run");
    assert!(status.success(), "the binaries can't be built");
    directory.join("conclave")
}

/// A directory that the daemon's user owns and can walk to.
#[derive(Debug)]
pub struct Place(TempDir);

impl Place {
    /// An empty directory.
    #[must_use]
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("conclave-").tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        give_to_daemon(directory.path());
        Self(directory)
    }

    /// The path of `name` in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file that the daemon can read.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        path
    }

    /// Copies one of the built test policies here.
    pub fn copy_policy(&self, name: &str) -> PathBuf {
        self.write(name, fs::read(policies().join(name)).unwrap())
    }

    /// Assembles WebAssembly text to a module file here.
    pub fn assemble(&self, name: &str, text: &str) -> PathBuf {
        let module = wat::parse_str(text).unwrap_or_else(|error| panic!("{name}: {error}"));
        self.write(name, module)
    }
}

impl Default for Place {
    fn default() -> Self {
        Self::new()
    }
}

/// Gives a file to the user that the daemon becomes when it is started as root.
pub fn give_to_daemon(path: &Path) {
    if geteuid().is_root() {
        let user = daemon_user();
        chown(path, Some(user.uid), Some(user.gid)).unwrap();
    }
}

/// The user that the daemon runs as in these tests.
#[must_use]
pub fn daemon_user() -> User {
    if geteuid().is_root() {
        User::from_name("nobody").unwrap().expect("there is a user nobody")
    } else {
        User::from_uid(geteuid()).unwrap().expect("the user of the tests has an account")
    }
}

/// `--user nobody` where it is needed and allowed.
#[must_use]
pub fn user_arguments() -> &'static [&'static str] {
    if geteuid().is_root() { &["--user", "nobody"] } else { &[] }
}

/// A custom section `io.kubewarden.metadata` with this content, as bytes to append to a
/// module.
#[must_use]
pub fn metadata_section(json: &str) -> Vec<u8> {
    let name = b"io.kubewarden.metadata";
    let mut payload = leb128(name.len());
    payload.extend_from_slice(name);
    payload.extend_from_slice(json.as_bytes());
    let mut section = vec![0];
    section.extend(leb128(payload.len()));
    section.extend(payload);
    section
}

fn leb128(mut value: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let byte = u8::try_from(value & 0x7f).unwrap();
        value >>= 7;
        if value == 0 {
            bytes.push(byte);
            return bytes;
        }
        bytes.push(byte | 0x80);
    }
}

/// Metadata of a policy for that execution mode, complete enough to be served.
#[must_use]
pub fn metadata(execution_mode: &str) -> String {
    let protocol = if execution_mode == "kubewarden-wapc" { "v1" } else { "Unknown" };
    format!(
        r#"{{"protocolVersion":"{protocol}","rules":[{{"apiGroups":[""],"apiVersions":["v1"],"resources":["pods"],"operations":["CREATE"]}}],"mutating":false,"executionMode":"{execution_mode}"}}"#
    )
}

/// A policy in a few lines of WebAssembly text, without metadata, for that execution mode.
/// It accepts any settings. Asked about a request it runs `body` and then gives `answer`,
/// which a body for WASI must do itself, with `(call $print (i32.const 1))` for stdout.
/// There are also `(call $sleep (i32.const MILLISECONDS))`, `(call $exit (i32.const CODE))`
/// and, for waPC, `(call $log)`, which has the answer logged.
#[must_use]
pub fn module(execution_mode: &str, answer: &str, body: &str) -> Vec<u8> {
    let (imports, entry) = match execution_mode {
        "wasi" => (WASI_IMPORTS, WASI_ENTRY),
        _ => (WAPC_IMPORTS, WAPC_ENTRY),
    };
    let bytes: String = answer.bytes().map(|byte| format!("\\{byte:02x}")).collect();
    let text = format!(
        r#"(module {imports}
          (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
          (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
          (memory (export "memory") 1)
          (data (i32.const 1024) "{{\"valid\":true}}")
          (data (i32.const 2048) "{bytes}")
          (func $sleep (param $milliseconds i32)
            (i32.store (i32.const 272) (i32.const 1))
            (i64.store (i32.const 280) (i64.mul (i64.extend_i32_u (local.get $milliseconds)) (i64.const 1000000)))
            (drop (call $poll (i32.const 256) (i32.const 512) (i32.const 1) (i32.const 768))))
          {entry})"#
    );
    let text = text.replace("ANSWER_LENGTH", &answer.len().to_string()).replace("BODY", body);
    wat::parse_str(&text).unwrap_or_else(|error| panic!("{error}"))
}

/// [`module`] with complete metadata.
#[must_use]
pub fn policy(execution_mode: &str, answer: &str, body: &str) -> Vec<u8> {
    let mut bytes = module(execution_mode, answer, body);
    bytes.extend(metadata_section(&metadata(execution_mode)));
    bytes
}

const WASI_IMPORTS: &str = r#"
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))"#;

// "validate-settings" makes the arguments longer than "validate" does.
const WASI_ENTRY: &str = r#"
  (func $write (param $fd i32) (param $at i32) (param $length i32)
    (i32.store (i32.const 16) (local.get $at))
    (i32.store (i32.const 20) (local.get $length))
    (drop (call $fd_write (local.get $fd) (i32.const 16) (i32.const 1) (i32.const 24))))
  (func $print (param $fd i32)
    (call $write (local.get $fd) (i32.const 2048) (i32.const ANSWER_LENGTH)))
  (func (export "_start")
    (drop (call $args (i32.const 0) (i32.const 4)))
    (if (i32.gt_u (i32.load (i32.const 4)) (i32.const 21))
      (then (call $write (i32.const 1) (i32.const 1024) (i32.const 14)) (return)))
    BODY)"#;

const WAPC_IMPORTS: &str = r#"
  (import "wapc" "__guest_response" (func $respond (param i32 i32)))
  (import "wapc" "__console_log" (func $console_log (param i32 i32)))"#;

const WAPC_ENTRY: &str = r#"
  (func $log (call $console_log (i32.const 2048) (i32.const ANSWER_LENGTH)))
  (func (export "__guest_call") (param $operation_length i32) (param i32) (result i32)
    (if (i32.gt_u (local.get $operation_length) (i32.const 8))
      (then (call $respond (i32.const 1024) (i32.const 14)) (return (i32.const 1))))
    BODY
    (call $respond (i32.const 2048) (i32.const ANSWER_LENGTH))
    (i32.const 1))"#;

/// `conclave` with these arguments, on a host where namespaces of these kinds can't be made:
/// in a user namespace, as the daemon's user, that forbids them. The kinds are named as below
/// `/proc/sys/user`: `user`, `mnt`, `pid`, `net`, `ipc`, `uts`, `cgroup`.
#[must_use]
pub fn conclave_without(kinds: &[&str], arguments: &[&str]) -> Command {
    let forbid: String = kinds
        .iter()
        .map(|kind| format!("echo 0 > /proc/sys/user/max_{kind}_namespaces && "))
        .collect();
    let forbid =
        forbid + "exec setpriv --ambient-caps=-all --inh-caps=-all --bounding-set=-all \"$@\"";
    let mut command = if geteuid().is_root() {
        let user = daemon_user();
        let mut command = Command::new("setpriv");
        command
            .arg(format!("--reuid={}", user.uid))
            .arg(format!("--regid={}", user.gid))
            .args(["--clear-groups", "unshare"]);
        command
    } else {
        Command::new("unshare")
    };
    command
        .args(["--user", "--map-current-user", "--keep-caps", "sh", "-c", &forbid, "sh"])
        .arg(conclave())
        .args(arguments)
        .current_dir("/")
        .stdin(Stdio::null());
    command
}

/// Whether this machine has what [`conclave_without`] needs; if not, the test is skipped.
#[must_use]
pub fn can_do_without(kinds: &[&str]) -> bool {
    let why = match conclave_without(kinds, &["--version"]).output() {
        Ok(output) if output.status.success() => return true,
        Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
        Err(error) => error.to_string(),
    };
    skipped(&format!("a host without {kinds:?} namespaces can't be simulated: {why}"));
    false
}

/// Says that a test could not run. Goes past the test runner, which would keep it from
/// sight because the test passes.
pub fn skipped(why: &str) {
    drop(writeln!(std::io::stderr(), "SKIPPED: {why}"));
}

/// A running `conclave serve`.
#[derive(Debug)]
pub struct Daemon {
    /// Its directory: `policies.yml`, the socket, the cache, modules.
    pub place: Place,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts a daemon over `policies_yml` with further arguments, and waits until it
    /// listens.
    #[must_use]
    pub fn start(place: Place, policies_yml: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(conclave());
        command.current_dir("/").arg("serve").args(user_arguments());
        Self::start_by(command, place, policies_yml, arguments)
    }

    /// [`Daemon::start`] by this command, which ends in `conclave serve`.
    #[must_use]
    pub fn start_by(
        mut command: Command,
        place: Place,
        policies_yml: &str,
        arguments: &[&str],
    ) -> Self {
        place.write("policies.yml", policies_yml);
        let log = place.path("log");
        let child = command
            .arg("--policies")
            .arg(place.path("policies.yml"))
            .arg("--socket")
            .arg(place.path("socket"))
            .args(if arguments.contains(&"--log-fmt") { &[][..] } else { &["--log-fmt", "json"] })
            .args(if arguments.contains(&"--cache-dir") || arguments.contains(&"--no-cache") {
                Vec::new()
            } else {
                vec!["--cache-dir".into(), place.path("cache").into_os_string()]
            })
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut daemon = Self { place, child, log };
        daemon.wait_for("the socket", |daemon| {
            assert!(daemon.child.try_wait().unwrap().is_none(), "daemon ended: {}", daemon.log());
            UnixStream::connect(daemon.socket()).is_ok()
        });
        daemon
    }

    /// Starts a daemon and waits until all its policies serve.
    #[must_use]
    pub fn start_ready(place: Place, policies_yml: &str, arguments: &[&str]) -> Self {
        let mut daemon = Self::start(place, policies_yml, arguments);
        daemon.wait_until_ready();
        daemon
    }

    /// Waits until `/readiness` says 200.
    pub fn wait_until_ready(&mut self) {
        self.wait_for("readiness", |daemon| daemon.get("/readiness").status == 200);
    }

    /// Waits until every policy was tried, ready or not.
    pub fn wait_until_tried(&mut self) {
        self.wait_for("the policies to be tried", |daemon| {
            assert!(daemon.child.try_wait().unwrap().is_none(), "daemon ended: {}", daemon.log());
            daemon.log().contains("all policies were tried")
        });
    }

    /// Polls until `condition` holds.
    pub fn wait_for(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !condition(self) {
            let waited = start.elapsed();
            assert!(waited < PATIENCE, "waited too long for {what}; log:\n{}", self.log());
            // Less and less often: a slow machine is not to be kept from its work by the asking.
            thread::sleep(
                (waited / 10).clamp(Duration::from_millis(5), Duration::from_millis(500)),
            );
        }
    }

    /// The path of the socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.place.path("socket")
    }

    /// Everything logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        let mut log = fs::read_to_string(&self.log).unwrap();
        // It may be about to write the rest of a line.
        log.truncate(log.rfind('\n').map_or(0, |end| end + 1));
        log
    }

    /// The log's lines as JSON.
    #[must_use]
    pub fn log_lines(&self) -> Vec<Value> {
        self.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// The daemon's process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    /// Its workers' processes, also those that were forked from a zygote.
    #[must_use]
    pub fn workers(&self) -> Vec<Pid> {
        let children = children_of(self.pid());
        let (zygotes, mut workers): (Vec<_>, Vec<_>) =
            children.into_iter().partition(|child| is_zygote(*child));
        workers.extend(zygotes.into_iter().flat_map(children_of));
        workers
    }

    /// The processes that workers are forked from.
    #[must_use]
    pub fn zygotes(&self) -> Vec<Pid> {
        children_of(self.pid()).into_iter().filter(|child| is_zygote(*child)).collect()
    }

    /// Sends a signal to the daemon.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Waits for the daemon's end and gives its exit code; `None` if a signal ended it.
    pub fn wait(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < PATIENCE, "the daemon does not end; log:\n{}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// A GET on a connection of its own.
    #[must_use]
    pub fn get(&self, path: &str) -> Answer {
        self.client().send("GET", path, &[], b"")
    }

    /// A POST of JSON on a connection of its own.
    #[must_use]
    pub fn post(&self, path: &str, body: impl AsRef<[u8]>) -> Answer {
        self.client().post(path, body)
    }

    /// A keep-alive client.
    #[must_use]
    pub fn client(&self) -> Client {
        Client::connect(&self.socket())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if thread::panicking() {
            // The directory may have been taken, and a panic here would be the second one.
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            let tail: Vec<_> = log.lines().rev().take(40).collect();
            for line in tail.iter().rev() {
                write_line(
                    line.get(..line.floor_char_boundary(SHOWN_BYTES_MAX)).unwrap_or_default(),
                );
            }
        }
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[expect(clippy::print_stderr, reason = "shown by the test runner when a test fails")]
fn write_line(line: &str) {
    eprintln!("daemon: {line}");
}

/// The child processes of a process.
#[must_use]
pub fn children_of(parent: Pid) -> Vec<Pid> {
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if status_field(Pid::from_raw(pid), "PPid").as_deref() == Some(parent.to_string().as_str())
        {
            children.push(Pid::from_raw(pid));
        }
    }
    children
}

/// Whether a child of a daemon's is there to be forked: it is started once for all requests, and
/// may have processes.
fn is_zygote(child: Pid) -> bool {
    let words = fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
    let role = words.split(|byte| *byte == 0).nth(1);
    let limits = fs::read_to_string(format!("/proc/{child}/limits")).unwrap_or_default();
    let processes = limits.lines().find_map(|line| line.strip_prefix("Max processes"));
    role == Some(b"snapshot") && processes.is_some_and(|limit| !limit.trim().starts_with("0 "))
}

/// A field of `/proc/PID/status`.
#[must_use]
pub fn status_field(pid: Pid, name: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let prefix = format!("{name}:");
    status.lines().find_map(|line| Some(line.strip_prefix(&prefix)?.trim().to_owned()))
}

/// Whether a process exists and is no zombie.
#[must_use]
pub fn is_alive(pid: Pid) -> bool {
    status_field(pid, "State").is_some_and(|state| !state.starts_with(['Z', 'X']))
}

/// An HTTP answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The head, in lower case.
    pub head: String,
    /// The body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error} in {}", String::from_utf8_lossy(&self.body)))
    }

    /// The AdmissionResponse in the body.
    #[must_use]
    pub fn response(&self) -> Value {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        self.json()["response"].clone()
    }
}

/// A keep-alive HTTP client over a Unix socket.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
}

impl Client {
    /// Connects.
    #[must_use]
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream }
    }

    /// The connection itself, for clients that misbehave.
    #[must_use]
    pub fn stream(&mut self) -> &mut UnixStream {
        &mut self.stream
    }

    /// Posts JSON and reads the answer.
    pub fn post(&mut self, path: &str, body: impl AsRef<[u8]>) -> Answer {
        self.send("POST", path, &["Content-Type: application/json"], body.as_ref())
    }

    /// Sends a request and reads the answer. A daemon may answer and close before it has
    /// read a body that it does not want, so a failure to write is not one yet.
    pub fn send(&mut self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> Answer {
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n",
            body.len()
        );
        for header in headers {
            head.push_str(header);
            head.push_str("\r\n");
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(body);
        drop(self.stream.write_all(&bytes));
        self.read()
    }

    /// Reads one answer.
    pub fn read(&mut self) -> Answer {
        let mut bytes = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            if let Some(answer) = parse_answer(&bytes) {
                return answer;
            }
            let read = self.stream.read(&mut chunk).unwrap();
            assert!(
                read > 0,
                "connection closed within an answer: {}",
                String::from_utf8_lossy(&bytes)
            );
            bytes.extend_from_slice(chunk.get(..read).unwrap());
        }
    }
}

fn parse_answer(bytes: &[u8]) -> Option<Answer> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(bytes.get(..end)?).to_lowercase();
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let length: usize = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .map_or(0, |length| length.parse().unwrap());
    let body = bytes.get(end + 4..end + 4 + length)?.to_vec();
    Some(Answer { status, head, body })
}

/// Runs `conclave` with these arguments, from a directory of its own, to its end.
#[must_use]
pub fn run(arguments: &[&str], stdin: &[u8]) -> Output {
    let mut child = Command::new(conclave())
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that refuses its arguments does not read.
    drop(child.stdin.take().unwrap().write_all(stdin));
    child.wait_with_output().unwrap()
}
