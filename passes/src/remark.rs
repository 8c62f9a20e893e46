//! Remarks and statistics: what passes have to say to people and reports.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What kind of message it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RemarkKind {
    /// Something was done.
    Applied,
    /// Something was not done, and why.
    Missed,
    /// Something to look at.
    Warning,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Remark {
    /// The pass that speaks.
    pub pass: String,
    /// The region, as `@3`.
    pub region: String,
    /// What kind of message it is.
    pub kind: RemarkKind,
    /// The message.
    pub message: String,
}

/// `1 weight`, `2 weights`: what people read of a number of things.
pub fn counted(count: u64, thing: &str) -> String {
    format!("{count} {thing}{}", if count == 1 { "" } else { "s" })
}

/// Collects messages and counters; the manager sets pass and region.
#[derive(Clone, Debug, Default)]
pub struct Remarks {
    pass: String,
    region: String,
    /// Messages, in order.
    pub list: Vec<Remark>,
    /// Counters and sums by pass and name.
    pub stats: BTreeMap<(String, String), f64>,
    /// Structured records for the report, by pass: one JSON object each.
    pub records: Vec<(String, serde_json::Value)>,
}

impl Remarks {
    /// Says who speaks from now on.
    pub fn enter(&mut self, pass: &str, region: &str) {
        self.pass = pass.to_owned();
        self.region = region.to_owned();
    }

    /// Adds a message.
    pub fn push(&mut self, kind: RemarkKind, message: impl Into<String>) {
        self.list.push(Remark { pass: self.pass.clone(), region: self.region.clone(), kind, message: message.into() });
    }

    /// Adds to a counter.
    pub fn count(&mut self, name: &str, by: f64) {
        *self.stats.entry((self.pass.clone(), name.to_owned())).or_default() += by;
    }

    /// Keeps the largest number given under a name.
    pub fn largest(&mut self, name: &str, value: f64) {
        let kept = self.stats.entry((self.pass.clone(), name.to_owned())).or_insert(value);
        *kept = kept.max(value);
    }

    /// Adds a record for the report: a JSON object; `region` is set to the region that is being compiled.
    pub fn record(&mut self, mut record: serde_json::Value) {
        if let Some(map) = record.as_object_mut() {
            map.insert("region".into(), self.region.clone().into());
        }
        self.records.push((self.pass.clone(), record));
    }
}
