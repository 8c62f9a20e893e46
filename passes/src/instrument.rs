//! Hooks around passes: what `--print-ir-*` and `--reproducer` are made of. A hook turns what the manager shows it
//! into events; the driver decides where events go.

use awqc_ir::{Module, RegionName};

use crate::diff;

/// Something for the driver to print or to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The text of a region, or what changed in it, for the terminal.
    Print {
        /// What it is: `@3 after fuse-rope`.
        title: String,
        /// IR text, or a unified diff.
        text: String,
    },
    /// A file below the directory that the user named.
    File {
        /// A relative path: `03-fuse-rope/@3.awqir`.
        path: String,
        /// Its contents.
        text: String,
    },
    /// What is needed to run a failure again: IR text that begins with the pipeline as a comment.
    Reproducer {
        /// The contents of the file.
        text: String,
    },
}

/// Where the manager is.
#[derive(Clone, Debug)]
pub struct Point<'a> {
    /// The position of the pass in the pipeline, from 0.
    pub index: usize,
    /// The pass.
    pub pass: &'a str,
    /// The region.
    pub region: &'a RegionName,
    /// The pipeline from this pass on.
    pub pipeline: &'a str,
}

/// A look at every region before and after every pass.
pub trait Hook {
    /// Before the pass runs. `text` prints the region; it is called only if someone wants to know.
    fn before(&mut self, at: &Point<'_>, text: &dyn Fn() -> String, sink: &mut dyn FnMut(Event)) {
        let _ = (at, text, sink);
    }

    /// After the pass has run.
    fn after(&mut self, at: &Point<'_>, text: &dyn Fn() -> String, sink: &mut dyn FnMut(Event)) {
        let _ = (at, text, sink);
    }

    /// After the pass, or a check of its result, has failed. `text` prints the region as it was before the pass.
    fn failed(&mut self, at: &Point<'_>, text: &dyn Fn() -> String, sink: &mut dyn FnMut(Event)) {
        let _ = (at, text, sink);
    }
}

/// The passes that a hook looks at: `all`, or names separated by commas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// Every pass.
    All,
    /// The named ones.
    Named(Vec<String>),
}

impl Selection {
    /// `all` or `name,name,…`.
    pub fn new(text: &str) -> Self {
        match text.trim() {
            "all" => Self::All,
            names => Self::Named(names.split(',').map(|n| n.trim().to_owned()).collect()),
        }
    }

    /// Whether the pass is among them.
    pub fn contains(&self, pass: &str) -> bool {
        match self {
            Self::All => true,
            Self::Named(names) => names.iter().any(|n| n == pass),
        }
    }
}

/// `--print-ir-before`: the region before the selected passes.
#[derive(Clone, Debug)]
pub struct PrintBefore(pub Selection);

impl Hook for PrintBefore {
    fn before(&mut self, at: &Point<'_>, text: &dyn Fn() -> String, sink: &mut dyn FnMut(Event)) {
        if self.0.contains(at.pass) {
            sink(Event::Print { title: format!("{} before {}", at.region, at.pass), text: text() });
        }
    }
}

/// `--print-ir-after`: the region after the selected passes.
#[derive(Clone, Debug)]
pub struct PrintAfter(pub Selection);

impl Hook for PrintAfter {
    fn after(&mut self, at: &Point<'_>, text: &dyn Fn() -> String, sink: &mut dyn FnMut(Event)) {
        if self.0.contains(at.pass) {
            sink(Event::Print { title: format!("{} after {}", at.region, at.pass), text: text() });
        }
    }
}

/// `--print-ir-change`: what each pass changed, and nothing for a pass that changed nothing.
#[derive(Clone, Debug, Default)]
pub struct PrintChange {
    before: String,
}

impl Hook for PrintChange {
    fn before(&mut self, _: &Point<'_>, text: &dyn Fn() -> String, _: &mut dyn FnMut(Event)) {
        self.before = text();
    }

    fn after(&mut self, at: &Point<'_>, text: &dyn Fn() -> String, sink: &mut dyn FnMut(Event)) {
        let after = text();
        if after != self.before {
            let name = format!("{} after {}", at.region, at.pass);
            let diff = diff::lines(&self.before, &after, &format!("{} before {}", at.region, at.pass), &name);
            sink(Event::Print { title: name, text: diff });
        }
    }
}

/// `--print-ir-dir`: a file for each pass and region, `00-input/…` being the region before the first pass.
#[derive(Clone, Debug, Default)]
pub struct PrintDir;

impl Hook for PrintDir {
    fn before(&mut self, at: &Point<'_>, text: &dyn Fn() -> String, sink: &mut dyn FnMut(Event)) {
        if at.index == 0 {
            sink(Event::File { path: format!("00-input/{}.awqir", at.region), text: text() });
        }
    }

    fn after(&mut self, at: &Point<'_>, text: &dyn Fn() -> String, sink: &mut dyn FnMut(Event)) {
        sink(Event::File { path: format!("{:02}-{}/{}.awqir", at.index + 1, at.pass, at.region), text: text() });
    }
}

/// `--reproducer`: when a pass fails, the region before it and the rest of the pipeline.
#[derive(Clone, Debug, Default)]
pub struct Reproducer;

impl Hook for Reproducer {
    fn failed(&mut self, at: &Point<'_>, text: &dyn Fn() -> String, sink: &mut dyn FnMut(Event)) {
        sink(Event::Reproducer { text: format!("// passes: {}\n{}", at.pipeline, text()) });
    }
}

/// Whatever prints a module: hooks see regions as modules of one region, which `awqc opt` reads back.
pub(crate) fn print(module: &Module) -> String {
    awqc_ir::text::print(module)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point<'a>(index: usize, region: &'a RegionName) -> Point<'a> {
        Point { index, pass: "dce", region, pipeline: "dce,fuse-rope" }
    }

    #[test]
    fn selections() {
        assert!(Selection::new("all").contains("dce"));
        assert!(Selection::new("fuse-rope, dce").contains("dce"));
        assert!(!Selection::new("fuse-rope").contains("dce"));
    }

    #[test]
    fn changes_print_only_when_there_are_some() {
        let region = RegionName::Layer(3);
        let (mut events, mut hook) = (Vec::new(), PrintChange::default());
        let mut sink = |e: Event| events.push(e);
        hook.before(&point(0, &region), &|| "a\n".into(), &mut sink);
        hook.after(&point(0, &region), &|| "a\n".into(), &mut sink);
        hook.before(&point(1, &region), &|| "a\n".into(), &mut sink);
        hook.after(&point(1, &region), &|| "b\n".into(), &mut sink);
        let text = "--- @3 before dce\n+++ @3 after dce\n@@ -1 +1 @@\n-a\n+b\n".to_owned();
        assert_eq!(events, [Event::Print { title: "@3 after dce".into(), text }]);
    }

    #[test]
    fn files_are_numbered_in_pipeline_order() {
        let region = RegionName::Named("head".into());
        let mut paths = Vec::new();
        let mut sink = |e: Event| {
            if let Event::File { path, .. } = e {
                paths.push(path);
            }
        };
        for i in 0..2 {
            PrintDir.before(&point(i, &region), &String::new, &mut sink);
            PrintDir.after(&point(i, &region), &String::new, &mut sink);
        }
        assert_eq!(paths, ["00-input/@head.awqir", "01-dce/@head.awqir", "02-dce/@head.awqir"]);
    }

    #[test]
    fn a_reproducer_names_the_rest_of_the_pipeline() {
        let mut text = String::new();
        let mut sink = |e: Event| {
            if let Event::Reproducer { text: t } = e {
                text = t;
            }
        };
        Reproducer.failed(&point(0, &RegionName::Layer(0)), &|| "awqir 1\n".into(), &mut sink);
        assert_eq!(text, "// passes: dce,fuse-rope\nawqir 1\n");
    }
}
