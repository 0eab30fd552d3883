//! How an attempt is to end.

use conclave_ipc::Phase;
use conclave_ipc::layers::{Layer, Layers};

use crate::attempts::{First, Next};
use crate::campaign::Trial;

/// What the filter of a loading worker lets pass. No foreign byte has been looked at by then,
/// and no foreign code runs before it has sealed itself.
const NEEDED_TO_LOAD: [(&str, &str); 20] = [
    ("descriptor/close-channel", "as the code; who loses its channel is ended"),
    ("memory/map-state-shared", "the guest is started on it; sealed thereafter"),
    ("descriptor/close", "the code is closed if it can't be linked"),
    ("identity/allow-writable-code", "the option that denies it is set after loading"),
    ("identity/new-privileges", "set before every filter"),
    ("information/limits", "limits are set after loading"),
    ("code/map-image-rwx", MAPS_CODE),
    ("code/map-image-x", MAPS_CODE),
    ("code/map-rwx", MAPS_CODE),
    ("code/map-rx", MAPS_CODE),
    ("code/map-wx", MAPS_CODE),
    ("code/map-x-shared", MAPS_CODE),
    ("code/protect-image-rx", MAPS_CODE),
    ("code/protect-rwx", MAPS_CODE),
    ("code/protect-rx", MAPS_CODE),
    ("code/replace-code", MAPS_CODE),
    ("code/rewrite-code", MAPS_CODE),
    ("memory/seal", "code is sealed after loading"),
    ("memory/shared", MAPS_CODE),
    ("code/unmap-code", "there is no code yet"),
];
const MAPS_CODE: &str = "code is mapped and made executable; the next filter takes that away";

/// What the filter of a zygote lets pass, for it to fork and for what is forked to limit itself.
const NEEDED_TO_FORK: [(&str, &str); 5] = [
    ("descriptor/close", "the channel of the next worker is closed"),
    ("descriptor/close-channel", "as that; who loses its channel is ended"),
    ("identity/new-privileges", "set before every filter"),
    ("information/limits", "limits are set after a fork"),
    ("process/fork", "what it is for; how often is bounded, see process/fork-bomb"),
];

/// What the filter of a compiling worker lets pass.
const NEEDED_TO_COMPILE: [(&str, &str); 3] = [
    ("descriptor/close", "the module and the output are closed"),
    ("descriptor/image-read", "the image is the module to compile"),
    ("code/unmap-code", "loses its own code, and can have no other in that place"),
];

/// How an attempt came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Something stopped it.
    Stopped,
    /// It is needed, and was let pass.
    Needed,
    /// One layer alone stops it, and that one was left out.
    Alone,
    /// What would stop it next is a layer that this host does not give.
    NotOffered,
    /// It did not end as it had to.
    Wrong,
}

/// Judges how an attempt ended.
pub(crate) fn judge(trial: &Trial, end: &str, offered: Layers) -> Outcome {
    let attempt = trial.attempt;
    let first_is_out = match attempt.first {
        First::Filter(_) => trial.without == Some(Layer::SyscallFilter),
        First::Layer(layer, _) => trial.without == Some(layer) || !offered.contains(layer),
        First::Kernel(_) | First::Supervisor(_) | First::Needed => false,
    };
    if first_is_out { judge_next(trial, end, offered) } else { judge_first(trial, end) }
}

fn judge_first(trial: &Trial, end: &str) -> Outcome {
    let stopped_by_filter = is_killed_by_filter(end);
    let as_told = match trial.attempt.first {
        First::Filter("") => stopped_by_filter || end == "SIGSEGV",
        First::Filter(call) => end == format!("forbidden {call}"),
        First::Kernel(ends) | First::Layer(_, ends) | First::Supervisor(ends) => {
            ends.contains(&end)
        }
        First::Needed => end == "succeeded",
    };
    match (trial.phase, trial.attempt.first) {
        (_, First::Needed) if as_told => Outcome::Needed,
        _ if as_told => Outcome::Stopped,
        (Phase::Serve, _) => Outcome::Wrong,
        // Other roles have other filters; what they let pass may be stopped by what is next.
        _ if stopped_by_filter || stopped_by_next(trial, end) => Outcome::Stopped,
        (phase, _) if is_needed(phase, trial.attempt.id) => Outcome::Needed,
        _ => Outcome::Wrong,
    }
}

fn is_killed_by_filter(end: &str) -> bool {
    end == "SIGSYS" || end.starts_with("forbidden ")
}

fn stopped_by_next(trial: &Trial, end: &str) -> bool {
    end != "succeeded"
        && match trial.attempt.next {
            Next::Layer(_, ends) | Next::Kernel(ends) => ends.contains(&end),
            Next::Nothing(..) | Next::NotAsked => false,
        }
}

fn is_needed(phase: Phase, id: &str) -> bool {
    let needed: &[(&str, &str)] = match phase {
        Phase::Compile => &NEEDED_TO_COMPILE,
        Phase::Load => &NEEDED_TO_LOAD,
        Phase::Zygote => &NEEDED_TO_FORK,
        Phase::Serve => &[],
    };
    needed.iter().any(|(needed, _)| *needed == id)
}

fn judge_next(trial: &Trial, end: &str, offered: Layers) -> Outcome {
    match trial.attempt.next {
        // A kernel that does not have it.
        _ if end == "ENOSYS" => Outcome::Stopped,
        Next::Layer(layer, _) if !offered.contains(layer) => Outcome::NotOffered,
        Next::Layer(_, ends) | Next::Kernel(ends) if ends.contains(&end) => Outcome::Stopped,
        // Some kernels refuse what others do not.
        Next::Nothing(ends, _) if ends.contains(&end) && end.starts_with('E') => Outcome::Stopped,
        Next::Nothing(ends, _) if ends.contains(&end) => Outcome::Alone,
        _ => Outcome::Wrong,
    }
}
