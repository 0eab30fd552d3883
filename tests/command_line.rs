//! `conclave run`, and what a person at a shell is told when something is wrong.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::path::Path;

use harness::{Place, metadata, metadata_section, module, policy, request, run, user_arguments};
use serde_json::{Value, json};

const WAPC: &str = "kubewarden-wapc";

const ACCEPTING: &str = r#"{"accepted":true}"#;

const PRIVILEGED: &str = concat!(
    r#"{"uid":"8f2a7c1e-0b64-4d0c-9a55-3d8f6c1b2e90","allowed":false,"status":{"message":"#,
    r#""privileged mode is not allowed: init container 'migrate', container 'log-shipper'"},"#,
    r#""auditAnnotations":null,"warnings":null}"#,
    "\n"
);

/// What a command left behind.
#[derive(Debug)]
struct Said {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Said {
    /// The verdict: one line on stdout, and nothing else there.
    #[track_caller]
    fn verdict(&self) -> Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        let line = self.stdout.strip_suffix('\n').unwrap();
        assert!(!line.contains('\n'), "{self:?}");
        serde_json::from_str(line).unwrap()
    }

    /// The reason why there is no verdict.
    #[track_caller]
    fn complaint(&self, part: &str) {
        assert_eq!((self.code, self.stdout.as_str()), (Some(1), ""), "{self:?}");
        let complaint = self.stderr.lines().find_map(|line| line.strip_prefix("conclave: "));
        assert!(complaint.is_some_and(|complaint| complaint.contains(part)), "{part}: {self:?}");
    }

    /// The arguments were wrong.
    #[track_caller]
    fn usage_error(&self, part: &str) {
        assert_eq!((self.code, self.stdout.as_str()), (Some(2), ""), "{self:?}");
        assert!(
            self.stderr.starts_with("error: ") && self.stderr.contains(part),
            "{part}: {self:?}"
        );
    }
}

/// Runs `conclave` with arguments as they are.
fn conclave(arguments: &[&str], stdin: &str) -> Said {
    let output = run(arguments, stdin.as_bytes());
    Said {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A directory with requests and a built policy, and a cache that all runs in it share.
struct Desk(Place);

impl Desk {
    fn with(modules: &[&str]) -> Self {
        let place = Place::new();
        for name in ["pod-ok.json", "pod-privileged.json", "pod-labelled.json", "raw-ok.json"] {
            place.write(name, request(name));
        }
        for name in modules {
            place.copy_policy(name);
        }
        Self(place)
    }

    fn path(&self, name: &str) -> String {
        self.0.path(name).to_str().unwrap().to_owned()
    }

    /// `conclave run` about the policy of that file.
    fn run(&self, policy: &str, arguments: &[&str]) -> Said {
        self.run_on("", policy, arguments)
    }

    fn run_on(&self, stdin: &str, policy: &str, arguments: &[&str]) -> Said {
        let (policy, cache) = (self.path(policy), self.path("cache"));
        let fixed = ["run", policy.as_str(), "--cache-dir", cache.as_str()];
        conclave(&[&fixed, user_arguments(), arguments].concat(), stdin)
    }
}

#[test]
fn a_verdict_of_either_kind_is_one_line_on_stdout_and_exit_code_0() {
    let desk = Desk::with(&["pod-guard.wasm"]);
    let said = desk.run("pod-guard.wasm", &["-r", &desk.path("pod-privileged.json")]);
    assert_eq!((said.code, said.stdout.as_str()), (Some(0), PRIVILEGED), "{}", said.stderr);

    let said = desk.run("pod-guard.wasm", &["--request-path", &desk.path("pod-ok.json")]);
    assert_eq!(said.verdict()["allowed"], true);
    assert_eq!(said.stderr, "", "nothing to complain about");

    // However much is logged, and in whatever format, it is on stderr.
    let request = desk.path("pod-privileged.json");
    let said =
        desk.run("pod-guard.wasm", &["-r", &request, "--log-level", "trace", "--log-fmt", "json"]);
    assert_eq!(said.stdout, PRIVILEGED);
    let lines: Vec<Value> =
        said.stderr.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().any(|line| line["message"] == "policy_log"), "{lines:?}");
}

#[test]
fn the_request_is_a_review_or_its_inside_in_a_file_or_on_stdin() {
    let desk = Desk::with(&["pod-guard.wasm"]);
    let review = request("pod-privileged.json");
    let inside: Value = serde_json::from_str::<Value>(&review).unwrap()["request"].take();
    let inside = inside.to_string();
    desk.0.write("inside.json", &inside);
    let in_a_file = desk.run("pod-guard.wasm", &["-r", &desk.path("inside.json")]);
    let review = desk.run_on(&review, "pod-guard.wasm", &["-r", "-"]);
    let inside = desk.run_on(&inside, "pod-guard.wasm", &["-r", "-"]);
    for said in [in_a_file, review, inside] {
        assert_eq!((said.code, said.stdout.as_str()), (Some(0), PRIVILEGED), "{}", said.stderr);
    }
}

#[test]
fn a_raw_request_is_any_value_and_is_passed_as_it_is() {
    let desk = Desk::with(&["raw-gate.wasm"]);
    let settings = r#"{"validUsers":["tonio"],"validActions":["eats"],"validResources":["hay"]}"#;
    let ask = |request: Value| {
        let arguments = ["--raw", "-r", "-", "--settings-json", settings];
        desk.run_on(&request.to_string(), "raw-gate.wasm", &arguments)
    };
    let good = json!({"user": "tonio", "action": "eats", "resource": "hay", "uid": "mine"});
    let expected =
        json!({"uid": "mine", "allowed": true, "auditAnnotations": null, "warnings": null});
    assert_eq!(ask(good.clone()).verdict(), expected);
    // There is no envelope to take off.
    let verdict = ask(json!({"request": good})).verdict();
    assert_eq!(verdict["status"]["code"], 400);

    // What a policy prints is not mistaken for its verdict.
    let mut noisy = good;
    noisy["print"] = json!("{\"allowed\":false}\nmore");
    assert_eq!(ask(noisy).verdict(), expected);

    // A policy that crashes has been judged: the request is rejected.
    let said = ask(json!({"panic": true}));
    let verdict = said.verdict();
    assert_eq!((&verdict["allowed"], &verdict["status"]["code"]), (&json!(false), &json!(500)));
    let message = verdict["status"]["message"].as_str().unwrap();
    assert!(message.starts_with("internal server error: Guest call failure: "), "{message}");
    assert!(said.stderr.contains("the policy gave no verdict"), "{}", said.stderr);
    // No network and no grants: `run` allows every host call, but cannot answer this one.
    let verdict = ask(json!({"hostcall": true})).verdict();
    let message = verdict["status"]["message"].as_str().unwrap();
    assert!(message.contains("'kubernetes/get_resource' is not available"), "{message}");
}

#[test]
fn settings_come_from_yaml_or_json_and_are_judged_by_the_policy() {
    let desk = Desk::with(&["label-adder.wasm"]);
    desk.0.write("settings.yml", "# of the team\nlabels:\n  team: web\n");
    desk.0.write("settings.json", r#"{"labels": {"team": "web"}}"#);
    let request = desk.path("pod-ok.json");
    let ask =
        |arguments: &[&str]| desk.run("label-adder.wasm", &[&["-r", &request], arguments].concat());
    for arguments in [
        ["-s", &desk.path("settings.yml")],
        ["--settings-path", &desk.path("settings.json")],
        ["--settings-json", r#"{"labels": {"team": "web"}}"#],
    ] {
        let verdict = ask(&arguments).verdict();
        assert_eq!(verdict["auditAnnotations"], json!({"labels-set": "team=web"}), "{arguments:?}");
        assert_eq!(verdict["patchType"], "JSONPatch", "run lets a policy mutate");
    }

    ask(&[]).complaint("Policy settings are invalid: labels must not be empty");
    ask(&["--settings-json", r#"{"labels": {"team": "not a label"}}"#])
        .complaint("Policy settings are invalid: labels: 'not a label' is not a value for 'team'");
    ask(&["--settings-json", r#"{"label": {}}"#]).complaint("unknown field `label`");
    ask(&["--settings-json", "[1]"])
        .complaint("--settings-json:1:1: settings: expected a mapping, found a list");
    ask(&["--settings-json", "{"]).complaint("--settings-json:1:");
    ask(&["-s", &desk.path("absent.yml")]).complaint("absent.yml: No such file or directory");
    desk.0.write("bad.yml", "labels:\n  team: web\n  team: cli\n");
    ask(&["-s", &desk.path("bad.yml")])
        .complaint("bad.yml:3:3: duplicate key \"settings.labels.team\" (first on line 2)");
}

#[test]
fn a_wasi_policy_runs_as_its_metadata_says() {
    let desk = Desk::with(&["go-labels.wasm"]);
    let request = desk.path("pod-labelled.json");
    let ask = |settings| desk.run("go-labels.wasm", &["-r", &request, "--settings-json", settings]);
    assert_eq!(ask(r#"{"required": ["team"]}"#).verdict()["allowed"], true);
    let verdict = ask(r#"{"required": ["owner"]}"#).verdict();
    assert_eq!(verdict["status"], json!({"message": "label \"owner\" is missing", "code": 422}));
    ask(r#"{"required": []}"#)
        .complaint("Policy settings are invalid: required must name at least one label");
}

#[test]
fn what_cannot_be_read_is_named() {
    let desk = Desk::with(&[]);
    desk.0.write("p.wasm", policy(WAPC, ACCEPTING, ""));
    let request = desk.path("pod-ok.json");
    desk.run("absent.wasm", &["-r", &request]).complaint("absent.wasm: No such file or directory");
    desk.run("pod-ok.json", &["-r", &request]).complaint("not a WebAssembly module");
    desk.run("", &["-r", &request]).complaint("not a regular file");
    desk.run("p.wasm", &["-r", &desk.path("absent.json")]).complaint("can't read the request");
    desk.run("p.wasm", &["-r", &desk.path("absent.json")])
        .complaint("absent.json: No such file or directory");
    desk.run_on("", "p.wasm", &["-r", "-"])
        .complaint("Failed to parse the request body as JSON: EOF");
    desk.run_on("{]", "p.wasm", &["-r", "-"])
        .complaint("Failed to parse the request body as JSON: ");
    desk.run_on("{}", "p.wasm", &["-r", "-"]).complaint("missing field `uid`");
    desk.run_on(r#"{"request": {"uid": "u"}}"#, "p.wasm", &["-r", "-"])
        .complaint("missing field `kind`");
    desk.run_on(r#"{"a": 1, "a": 2}"#, "p.wasm", &["--raw", "-r", "-"])
        .complaint("duplicate key `a`");
    let truncated = policy(WAPC, ACCEPTING, "");
    desk.0.write("truncated.wasm", truncated.get(..truncated.len() / 2).unwrap());
    desk.run("truncated.wasm", &["-r", &request]).complaint("bad module");
}

#[test]
fn a_policy_is_a_path_or_a_file_url() {
    let desk = Desk::with(&[]);
    desk.0.write("a policy.wasm", policy(WAPC, ACCEPTING, ""));
    let (cache, request) = (desk.path("cache"), desk.path("pod-ok.json"));
    let ask = |policy: &str| {
        let fixed = ["run", policy, "--cache-dir", &cache, "-r", &request];
        conclave(&[&fixed, user_arguments()].concat(), "")
    };
    let path = desk.path("a policy.wasm");
    let url = format!("file://{}", path.replace(' ', "%20"));
    for policy in [path.as_str(), url.as_str()] {
        assert_eq!(ask(policy).verdict()["allowed"], true, "{policy}");
    }
    ask("file://absent.wasm").complaint("file:///absolute/path");
    ask("file:///absent%20policy.wasm").complaint("/absent policy.wasm: No such file or directory");
    ask("registry://ghcr.io/kubewarden/policies/x:v1")
        .complaint("\"registry://\" is not supported");
    ask("https://example.com/policy.wasm").complaint("\"https://\" is not supported");
}

#[test]
fn wrong_arguments_are_usage_errors() {
    let desk = Desk::with(&[]);
    desk.0.write("p.wasm", policy(WAPC, ACCEPTING, ""));
    desk.0.write("settings.yml", "{}");
    let (request, settings) = (desk.path("pod-ok.json"), desk.path("settings.yml"));
    let ask = |arguments: &[&str]| desk.run("p.wasm", &[&["-r", &request], arguments].concat());
    ask(&["-s", &settings, "--settings-json", "{}"]).usage_error("cannot be used with");
    ask(&["--frobnicate"]).usage_error("--frobnicate");
    ask(&["second.wasm"]).usage_error("second.wasm");
    ask(&["--no-cache"]).usage_error("cannot be used with");
    for seconds in ["0", "-1", "soon", "3601"] {
        ask(&[&format!("--policy-timeout={seconds}")]).usage_error("--policy-timeout");
    }
    desk.run("p.wasm", &[]).usage_error("--request-path");
    conclave(&["run", "-r", &request], "").usage_error("<POLICY>");
    conclave(&["walk"], "").usage_error("walk");
    conclave(&["serve", "--socket-mode", "999"], "").usage_error("--socket-mode");
    conclave(&["serve", "--workers", "0"], "").usage_error("--workers");
    conclave(&["serve", "--max-body-bytes", "0"], "").usage_error("--max-body-bytes");
}

#[test]
fn help_is_there_for_every_command() {
    for (arguments, parts) in [
        (["--help"].as_slice(), ["serve", "run", "--version"]),
        (&["help"], ["serve", "run", "--version"]),
        (&["serve", "--help"], ["--policies", "--socket", "--allow-uid"]),
        (&["help", "serve"], ["--workers", "--grace-period", "--max-body-bytes"]),
        (&["run", "--help"], ["--request-path", "--settings-json", "--raw"]),
        (&["run", "-h"], ["--execution-mode", "--policy-timeout", "--no-cache"]),
    ] {
        let said = conclave(arguments, "");
        assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""), "{arguments:?}");
        for part in parts {
            assert!(said.stdout.contains(part), "{arguments:?}: {part}");
        }
    }
    let said = conclave(&["--version"], "");
    assert_eq!(said.stdout, concat!("conclave ", env!("CARGO_PKG_VERSION"), "\n"));
    let said = conclave(&[], "");
    assert_eq!((said.code, said.stdout.as_str()), (Some(2), ""), "{said:?}");
    assert!(said.stderr.contains("Usage: conclave"), "{said:?}");
}

#[test]
fn the_execution_mode_can_be_chosen_or_is_found_out() {
    let desk = Desk::with(&[]);
    let print = "(call $print (i32.const 1))";
    desk.0.write("wapc.wasm", module(WAPC, ACCEPTING, ""));
    desk.0.write("wasi.wasm", module("wasi", ACCEPTING, print));
    desk.0.assemble("neither.wasm", "(module (memory (export \"memory\") 1))");
    desk.0.assemble(
        "rego.wasm",
        "(module (func (export \"opa_eval\")) (memory (export \"memory\") 1))",
    );
    // The metadata says something else than what the module is.
    let mislabelled =
        [module("wasi", ACCEPTING, print), metadata_section(&metadata("opa"))].concat();
    desk.0.write("mislabelled.wasm", mislabelled);
    let request = desk.path("pod-ok.json");
    let ask = |policy: &str, mode: Option<&str>| {
        let mut arguments = vec!["-r", &request];
        arguments.extend(mode.iter().flat_map(|mode| ["--execution-mode", mode]));
        desk.run(policy, &arguments)
    };
    for (policy, mode) in [
        ("wapc.wasm", None),
        ("wapc.wasm", Some(WAPC)),
        ("wasi.wasm", None),
        ("wasi.wasm", Some("wasi")),
        ("mislabelled.wasm", Some("wasi")),
    ] {
        assert_eq!(ask(policy, mode).verdict()["allowed"], true, "{policy} {mode:?}");
    }
    for mode in ["kubewarden", "WASI", "rego", ""] {
        ask("wapc.wasm", Some(mode)).complaint(&format!("unsupported execution mode {mode:?}"));
    }
    for (policy, mode) in [("mislabelled.wasm", None), ("wapc.wasm", Some("gatekeeper"))] {
        ask(policy, mode).complaint("does not export the function eval");
    }
    ask("neither.wasm", None).complaint("exports neither __guest_call nor _start");
    ask("rego.wasm", None).complaint("compiled from Rego: say opa or gatekeeper");
    ask("wapc.wasm", Some("wasi")).complaint("does not export the function _start");
    ask("wasi.wasm", Some(WAPC)).complaint("does not export the function __guest_call");
}

#[test]
fn a_policy_that_breaks_is_a_rejection_and_not_an_error() {
    let desk = Desk::with(&[]);
    let spin = "(loop (br 0))";
    let sleep = "(call $sleep (i32.const 600000))";
    desk.0.write("wapc-trap.wasm", policy(WAPC, ACCEPTING, "unreachable"));
    desk.0.write("wasi-trap.wasm", policy("wasi", ACCEPTING, "unreachable"));
    desk.0.write("wapc-spin.wasm", policy(WAPC, ACCEPTING, spin));
    desk.0.write("wasi-sleep.wasm", policy("wasi", ACCEPTING, sleep));
    desk.0.write("words.wasm", policy(WAPC, "words", ""));
    let request = desk.path("pod-ok.json");
    let late = "Policy execution interrupted because it exceeded the allowed execution time";
    for (policy, part) in [
        ("wapc-trap.wasm", "internal server error: Guest call failure: "),
        ("wasi-trap.wasm", "unreachable"),
        ("wapc-spin.wasm", late),
        ("wasi-sleep.wasm", late),
        ("words.wasm", "internal server error: invalid response from policy: "),
    ] {
        let said = desk.run(policy, &["-r", &request, "--policy-timeout", "0.2"]);
        let verdict = said.verdict();
        assert_eq!(
            (&verdict["allowed"], &verdict["status"]["code"]),
            (&json!(false), &json!(500)),
            "{policy}"
        );
        let message = verdict["status"]["message"].as_str().unwrap();
        assert!(message.contains(part), "{policy}: {message}");
        assert!(said.stderr.contains("the policy gave no verdict"), "{policy}: {}", said.stderr);
    }
}

#[test]
fn a_cache_that_cannot_be_used_costs_a_warning_and_not_the_verdict() {
    let desk = Desk::with(&[]);
    let policy = desk.0.write("p.wasm", policy(WAPC, ACCEPTING, ""));
    let request = desk.path("pod-ok.json");
    let fixed = ["run", policy.to_str().unwrap(), "-r", &request];
    let said =
        conclave(&[&fixed, user_arguments(), &["--cache-dir", "/proc/nowhere"]].concat(), "");
    assert_eq!(said.verdict()["allowed"], true);
    assert!(said.stderr.contains("compiled code is not kept"), "{}", said.stderr);
    let said = conclave(&[&fixed, user_arguments(), &["--no-cache"]].concat(), "");
    assert_eq!(said.verdict()["allowed"], true);
    assert_eq!(said.stderr, "");
}

/// `conclave serve` over the `policies.yml` of that place, which must not get as far as
/// listening.
fn serve_in_vain(place: &Place) -> Said {
    let paths = ["policies.yml", "socket", "cache"].map(|name| place.path(name));
    let [policies, socket, cache] = paths.each_ref().map(|path| path.to_str().unwrap());
    let fixed = ["serve", "--policies", policies, "--socket", socket, "--cache-dir", cache];
    let said = conclave(&[&fixed, user_arguments()].concat(), "");
    assert!(!Path::new(socket).exists(), "{said:?}");
    said
}

#[test]
fn a_policies_yml_that_cannot_be_read_is_named_with_the_reason() {
    let place = Place::new();
    serve_in_vain(&place).complaint("/policies.yml: cannot be read");
    serve_in_vain(&place).complaint("No such file or directory");
}

#[test]
fn a_wrong_policies_yml_keeps_the_daemon_from_starting_and_is_quoted_by_line() {
    let place = Place::new();
    for (text, complaint) in [
        ("", ": no policies"),
        ("p:\n  module: [x\n", ":2:"),
        (
            "p:\n  module: p.wasm\n  polcyMode: monitor\n",
            ":3:3: policy \"p\": unknown key \"polcyMode\"",
        ),
        (
            "p:\n  module: p.wasm\n  policyMode: watch\n",
            ":3:15: policy \"p\": policyMode: expected protect or monitor",
        ),
        ("p:\n  settings: {}\n", ":1:1: policy \"p\": required key \"module\" is missing"),
        (
            "p:\n  module: p.wasm\n  settings: [1]\n",
            ":3:13: policy \"p\": settings: expected a mapping",
        ),
        (
            "p:\n  module: p.wasm\n  allowedToMutate: 1\n",
            ":3:20: policy \"p\": allowedToMutate: expected",
        ),
        ("p:\n  module: p.wasm\n  sha256: abc\n", ":3:11: policy \"p\": sha256: "),
        (
            "p:\n  module: p.wasm\n  hostCapabilities: [oc/*]\n",
            ":3:22: policy \"p\": hostCapabilities: ",
        ),
        (
            "p:\n  module: p.wasm\n  timeoutEvalSeconds: 0\n",
            ":3:23: policy \"p\": timeoutEvalSeconds: ",
        ),
        (
            "p:\n  module: registry://x/y\n",
            ":2:11: policy \"p\": module: \"registry://\" is not supported",
        ),
        (
            "p: {module: p.wasm}\np: {module: q.wasm}\n",
            ":2:1: policy \"p\": defined twice (first on line 1)",
        ),
        ("a/b: {module: p.wasm}\n", ":1:1: policy name \"a/b\""),
        (
            "g: {expression: 'a()', policies: {a: {module: a.wasm}}, message: m}\n",
            ":1:1: policy \"g\": this is a policy group",
        ),
    ] {
        place.write("policies.yml", text);
        serve_in_vain(&place).complaint(&format!("/policies.yml{complaint}"));
    }
}
