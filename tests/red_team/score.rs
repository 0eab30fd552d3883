//! What all attempts came to: a table, a few lines, and whether it is as it has to be.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write as _};

use conclave_ipc::Phase;
use conclave_ipc::layers::Layer;

use crate::attempts::{self, Attempt, First, Next};
use crate::campaign::{Campaign, Trial, role};
use crate::expectations::{Outcome, judge};

/// One column of the table: when, and which layer was left out.
type Column = (&'static str, Option<Layer>);

/// All results.
#[derive(Debug, Default)]
pub(crate) struct Score {
    results: BTreeMap<(&'static str, Column), (Outcome, String)>,
    columns: Vec<Column>,
    /// Layers that this host does not give.
    missing: BTreeSet<&'static str>,
}

fn column(trial: &Trial) -> Column {
    (role(trial.phase, trial.forked), trial.without)
}

impl Score {
    /// Judges a campaign.
    pub(crate) fn count(&mut self, campaign: &Campaign) {
        for (trial, end) in &campaign.ends {
            let column = column(trial);
            if !self.columns.contains(&column) {
                self.columns.push(column);
            }
            let outcome = judge(trial, end, campaign.offered);
            if outcome == Outcome::NotOffered
                && let Next::Layer(layer, _) = trial.attempt.next
            {
                self.missing.insert(layer.name());
            }
            self.results.insert((trial.attempt.id, column), (outcome, end.clone()));
        }
    }

    /// The attempts that came out so in any of the columns.
    fn with(&self, outcome: Outcome) -> BTreeSet<&'static str> {
        let found = self.results.iter().filter(|(_, (found, _))| *found == outcome);
        found.map(|((id, _), _)| *id).collect()
    }

    /// The attempts that got what they wanted and had no right to, in any of the columns.
    fn succeeded(&self, is_in: impl Fn(Column) -> bool) -> usize {
        let results = self.results.iter();
        let found = results.filter(|((_, column), (outcome, end))| {
            *outcome == Outcome::Wrong && end == "succeeded" && is_in(*column)
        });
        found.map(|((id, _), _)| *id).collect::<BTreeSet<_>>().len()
    }

    /// The table to standard output, the score past the test runner.
    pub(crate) fn print(&self) {
        self.print_table();
        let complete = |column: Column| column.1.is_none();
        let left_out: BTreeSet<_> = self.columns.iter().filter_map(|column| column.1).collect();
        let needed = attempts::all().filter(|attempt| attempt.first == First::Needed).count();
        tell(&format!(
            "red team: {} attempts x {} roles: {} succeeded; 1 layer off ({} layers): {} succeeded \
             but {} that one layer alone stops; {needed} needed calls allowed",
            attempts::all().count() - needed,
            Phase::ALL.len() + 1,
            self.succeeded(complete),
            left_out.len(),
            self.succeeded(|column| !complete(column)),
            self.with(Outcome::Alone).len(),
        ));
        let groups: BTreeSet<_> = attempts::all().map(Attempt::group).collect();
        for group in groups {
            tell(&format!("red team: {group}: {}", self.group(group)));
        }
        for layer in &self.missing {
            harness::skipped(&format!("what {layer} would stop: this host does not give it"));
        }
    }

    /// One group's line: what stops its attempts first, and what next.
    fn group(&self, group: &str) -> String {
        let members: Vec<_> = attempts::all().filter(|attempt| attempt.group() == group).collect();
        let alone = self.with(Outcome::Alone);
        let first =
            |is: fn(&First) -> bool| members.iter().filter(|attempt| is(&attempt.first)).count();
        format!(
            "{} attempts; first stopped by the filter {}, another layer {}, the kernel {}, the \
             supervisor {}; by one layer alone {}",
            members.len() - first(|first| *first == First::Needed),
            first(|first| matches!(first, First::Filter(_))),
            first(|first| matches!(first, First::Layer(..))),
            first(|first| matches!(first, First::Kernel(_))),
            first(|first| matches!(first, First::Supervisor(_))),
            members.iter().filter(|attempt| alone.contains(attempt.id)).count(),
        )
    }

    fn print_table(&self) {
        for (number, (phase, without)) in self.columns.iter().enumerate() {
            let without = without.map_or_else(
                || "all layers".to_owned(),
                |layer| format!("without {}", layer.name()),
            );
            println!("column {number}: {phase}, {without}");
        }
        for attempt in attempts::all() {
            let ends = self.columns.iter().map(|column| {
                self.results.get(&(attempt.id, *column)).map_or("-", |(_, end)| short(end))
            });
            let ends: String = ends.map(|end| format!(" {end:12}")).collect();
            println!("{:34}{ends}  {}", attempt.id, attempt.tries);
        }
        println!("stopped by one layer alone:");
        for attempt in attempts::all() {
            if let Next::Nothing(_, why) = attempt.next {
                println!("  {:34} {why}", attempt.id);
            }
        }
    }

    /// Fails with all that is not as it has to be.
    pub(crate) fn assert_right(&self) {
        let wrong = self.results.iter().filter(|(_, (outcome, _))| *outcome == Outcome::Wrong);
        let wrong: Vec<_> = wrong
            .map(|((id, (phase, without)), (_, end))| {
                format!("{id} ({phase}, without {without:?}): {end}")
            })
            .collect();
        assert!(wrong.is_empty(), "{} ended otherwise:\n{}", wrong.len(), wrong.join("\n"));
    }
}

/// An end in twelve characters.
fn short(end: &str) -> &str {
    if end.starts_with("forbidden ") {
        return "killed";
    }
    end.get(..12).unwrap_or(end)
}

/// Past the test runner, as for tests that are skipped.
pub(crate) fn tell(line: &str) {
    drop(writeln!(io::stderr(), "{line}"));
}
