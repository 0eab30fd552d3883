//! The reports of `conclave sandbox`, for people and as JSON.
#![forbid(unsafe_code)]

use comfy_table::{Table, presets};
use conclave_ipc::Phase;
use conclave_ipc::layers::{Layer, Layers};
use conclave_ipc::message::Confinement;
use nix::unistd::Pid;
use serde_json::{Map, Value, json};

use super::advice;
use super::evidence::{Evidence, Seen};

/// A worker that was taken to a phase, and what it and the kernel say then.
#[derive(Debug)]
pub(crate) struct Trial {
    pub(crate) phase: Phase,
    pub(crate) report: Confinement,
    /// Nothing if the worker was gone before it could be looked at.
    pub(crate) seen: Option<Evidence>,
}

/// What this host gives, by one trial in each phase.
#[derive(Debug)]
pub(crate) struct HostReport {
    pub(crate) trials: Vec<Trial>,
}

/// What the workers of a running daemon are locked up with.
#[derive(Debug)]
pub(crate) struct LiveReport {
    pub(crate) daemon: Pid,
    pub(crate) uid: u32,
    pub(crate) workers: Vec<Evidence>,
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    table
}

fn seen_in(evidence: &Evidence, layer: Layer) -> Option<Seen> {
    evidence.layers.iter().find(|(of, _)| *of == layer).map(|(_, seen)| *seen)
}

impl Trial {
    fn reports(&self, layer: Layer) -> bool {
        self.report.layers.contains(layer)
    }

    fn seen(&self, layer: Layer) -> Seen {
        self.seen.as_ref().and_then(|seen| seen_in(seen, layer)).unwrap_or(Seen::Hidden)
    }

    /// Whether the kernel denies what the worker says of itself.
    fn is_contradicted(&self, layer: Layer) -> bool {
        layer.is_used_in(self.phase) && self.reports(layer) && self.seen(layer) == Seen::Missing
    }

    fn cell(&self, layer: Layer) -> &'static str {
        match (layer.is_used_in(self.phase), self.reports(layer), self.seen(layer)) {
            (false, _, _) => "-",
            (true, false, _) => "no",
            (true, true, Seen::InForce) => "yes",
            (true, true, Seen::Missing) => "NOT SEEN",
            (true, true, Seen::NotShown) => "yes *",
            (true, true, Seen::Hidden) => "yes ?",
        }
    }
}

impl HostReport {
    /// What some phase has, the host gives.
    fn offered(&self) -> Layers {
        self.trials.iter().fold(Layers::NONE, |all, trial| all.union(trial.report.layers))
    }

    fn missing(&self) -> Vec<Layer> {
        let offered = self.offered();
        Layer::ALL.into_iter().filter(|layer| !offered.contains(*layer)).collect()
    }

    fn contradicted(&self) -> Vec<Layer> {
        let denied = |layer: &Layer| self.trials.iter().any(|trial| trial.is_contradicted(*layer));
        Layer::ALL.into_iter().filter(denied).collect()
    }

    fn landlock_abi(&self) -> u8 {
        self.trials.iter().map(|trial| trial.report.landlock_abi).min().unwrap_or(0)
    }

    /// Whether workers can be locked up here as they should be.
    ///
    /// # Errors
    /// What stands against it, in words.
    pub(crate) fn verdict(&self) -> Result<(), String> {
        let names =
            |layers: Vec<Layer>| layers.into_iter().map(Layer::name).collect::<Vec<_>>().join(", ");
        let contradicted = self.contradicted();
        if !contradicted.is_empty() {
            return Err(format!("the kernel does not show: {}", names(contradicted)));
        }
        let required: Vec<_> =
            self.missing().into_iter().filter(|layer| layer.is_required()).collect();
        if required.is_empty() {
            return Ok(());
        }
        Err(format!("this host lacks required layers of the sandbox: {}", names(required)))
    }

    /// The table for people.
    pub(crate) fn text(&self) -> String {
        let offered = self.offered();
        let phases = self.trials.iter().map(|trial| trial.phase.name());
        let mut rows = table(&["layer", "this host"].into_iter().chain(phases).collect::<Vec<_>>());
        for layer in Layer::ALL {
            let host = match (layer, offered.contains(layer)) {
                (Layer::Landlock, true) => format!("yes, ABI {}", self.landlock_abi()),
                (_, true) => "yes".to_owned(),
                (_, false) if layer.is_required() => "NO".to_owned(),
                (_, false) => "no".to_owned(),
            };
            let cells = self.trials.iter().map(|trial| trial.cell(layer).to_owned());
            rows.add_row([layer.name().to_owned(), host].into_iter().chain(cells));
        }
        let mut text = format!(
            "{rows}\n\n-  not used in this role\n*  reported by the worker; the kernel shows this layer to nobody\n\
             ?  reported by the worker; not shown to this user\n"
        );
        let missing = self.missing();
        if missing.is_empty() {
            text.push_str("\nThis host gives every layer.\n");
        }
        for layer in missing {
            let weight = if layer.is_required() { "REQUIRED" } else { "not required" };
            text.push_str(&format!("\n{} ({weight}): {}\n", layer.name(), advice(layer)));
        }
        text
    }

    /// The same as JSON.
    pub(crate) fn json(&self) -> String {
        let offered = self.offered();
        let layers: Vec<_> = Layer::ALL
            .into_iter()
            .map(|layer| {
                let roles: Map<_, _> = self
                    .trials
                    .iter()
                    .filter(|trial| layer.is_used_in(trial.phase))
                    .map(|trial| {
                        let reported = trial.reports(layer);
                        let kernel = trial.seen(layer).name();
                        let role = json!({ "reported": reported, "kernel": kernel });
                        (trial.phase.name().to_owned(), role)
                    })
                    .collect();
                let offered = offered.contains(layer);
                json!({
                    "name": layer.name(),
                    "required": layer.is_required(),
                    "offered": offered,
                    "howToGet": if offered { None } else { Some(advice(layer)) },
                    "roles": roles,
                })
            })
            .collect();
        let complete = self.verdict().is_ok();
        json!({ "complete": complete, "landlockAbi": self.landlock_abi(), "layers": layers })
            .to_string()
    }
}

impl LiveReport {
    /// Workers that use a layer, and what the kernel shows of it.
    fn of_layer(&self, layer: Layer) -> impl Iterator<Item = (Pid, Seen)> {
        self.workers.iter().filter_map(move |worker| Some((worker.pid, seen_in(worker, layer)?)))
    }

    /// Whether no worker lacks a required layer, as far as we may look.
    ///
    /// # Errors
    /// Which one lacks what, in words.
    pub(crate) fn verdict(&self) -> Result<(), String> {
        for layer in Layer::ALL.into_iter().filter(|layer| layer.is_required()) {
            let missing = self.of_layer(layer).find(|(_, seen)| *seen == Seen::Missing);
            if let Some((pid, _)) = missing {
                return Err(format!("worker {pid} lacks a required layer: {}", layer.name()));
            }
        }
        let hidden = |layer| self.of_layer(layer).any(|(_, seen)| seen == Seen::Hidden);
        if Layer::ALL.into_iter().any(hidden) {
            return Err(
                "not all of it is shown to this user: ask as root, or as the daemon's user"
                    .to_owned(),
            );
        }
        Ok(())
    }

    /// The tables for people.
    pub(crate) fn text(&self) -> String {
        let mut workers = table(&[
            "worker",
            "role",
            "works on",
            "user",
            "threads",
            "descriptors",
            "own memory",
            "control group",
        ]);
        for worker in &self.workers {
            workers.add_row([
                worker.pid.to_string(),
                worker.phase.name().to_owned(),
                worker.works_on.clone(),
                worker.uid.to_string(),
                worker.threads.to_string(),
                worker.descriptors.map_or_else(|| "?".to_owned(), |count| count.to_string()),
                worker
                    .private_bytes
                    .map_or_else(|| "?".to_owned(), |bytes| format!("{} KiB", bytes / 1024)),
                worker.control_group.clone(),
            ]);
        }
        let mut layers = table(&["layer", "in force for"]);
        for layer in Layer::ALL {
            layers.add_row([layer.name().to_owned(), self.summary(layer)]);
        }
        format!(
            "daemon {} of user {}, {} workers\n\n{workers}\n\n{layers}\n",
            self.daemon,
            self.uid,
            self.workers.len()
        )
    }

    fn summary(&self, layer: Layer) -> String {
        let all: Vec<_> = self.of_layer(layer).collect();
        let count = |wanted| all.iter().filter(|(_, seen)| *seen == wanted).count();
        let (in_force, hidden) = (count(Seen::InForce), count(Seen::Hidden));
        match (all.len(), count(Seen::NotShown)) {
            (0, _) => "no worker uses it now".to_owned(),
            (_, 1..) => "the kernel shows this layer to nobody".to_owned(),
            (total, 0) if hidden > 0 => {
                format!("{in_force} of {total}; {hidden} hidden from this user")
            }
            (total, 0) => format!("{in_force} of {total}"),
        }
    }

    /// The same as JSON.
    pub(crate) fn json(&self) -> String {
        let workers: Vec<_> = self
            .workers
            .iter()
            .map(|worker| {
                let layers: Map<_, _> = worker
                    .layers
                    .iter()
                    .map(|(layer, seen)| (layer.name().to_owned(), Value::from(seen.name())))
                    .collect();
                json!({
                    "pid": worker.pid.as_raw(),
                    "role": worker.phase.name(),
                    "worksOn": worker.works_on,
                    "uid": worker.uid,
                    "threads": worker.threads,
                    "descriptors": worker.descriptors,
                    "privateBytes": worker.private_bytes,
                    "controlGroup": worker.control_group,
                    "layers": layers,
                })
            })
            .collect();
        json!({
            "complete": self.verdict().is_ok(),
            "daemon": { "pid": self.daemon.as_raw(), "uid": self.uid },
            "workers": workers,
        })
        .to_string()
    }
}
