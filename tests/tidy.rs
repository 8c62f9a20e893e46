//! The architecture's invariants, kept by reading the tree.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value as Json;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file below the folders, with its path relative to the root.
fn sources(folders: &[&str]) -> Vec<(PathBuf, String)> {
    fn walk(dir: &Path, out: &mut Vec<(PathBuf, String)>) {
        let mut entries: Vec<_> = fs::read_dir(dir).expect("a source folder").flatten().map(|e| e.path()).collect();
        entries.sort();
        for path in entries {
            if path.is_dir() {
                walk(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).expect("a source file");
                out.push((path.strip_prefix(root()).expect("below the root").to_path_buf(), text));
            }
        }
    }
    let mut out = Vec::new();
    folders.iter().for_each(|f| walk(&root().join(f), &mut out));
    assert!(out.len() > 3, "found no sources in {folders:?}");
    out
}

/// The text without its tests, comments and string escapes: what the rules below speak of.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let end = text.find("#[cfg(test)]").unwrap_or(text.len());
    let lines = text[..end].lines().enumerate().map(|(i, l)| (i + 1, l));
    lines.filter(|(_, l)| !l.trim_start().starts_with("//"))
}

const LIBRARIES: [&str; 6] =
    ["ir/src", "passes/src", "frontends/src", "backends/exec/src", "backends/cpu/src", "backends/cuda/src"];

fn fail_if_any(rule: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{rule}\n{}", found.join("\n"));
}

#[test]
fn every_file_says_what_it_is() {
    let all = sources(&["ir", "passes", "frontends", "backends", "src", "tests", "xtask", "examples"]);
    let missing = all.iter().filter(|(_, t)| !t.starts_with("//! ")).map(|(p, _)| p.display().to_string());
    fail_if_any("every file begins with a `//! ` header:", missing.collect());
}

#[test]
fn crates_import_along_the_arrows() {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    let metadata: Json = serde_json::from_slice(&out.stdout).expect("cargo metadata prints JSON");
    let allowed = |name: &str| -> &[&str] {
        match name {
            "awqc-ir" | "xtask" => &[],
            "awqc-frontends" | "awqc-passes" => &["awqc-ir"],
            "awqc-exec" => &["awqc-ir", "awqc-passes"],
            "awqc-cpu" | "awqc-cuda" => &["awqc-ir", "awqc-passes", "awqc-exec"],
            "awqc" => &["awqc-ir", "awqc-frontends", "awqc-passes", "awqc-exec", "awqc-cpu", "awqc-cuda"],
            other => panic!("say in this test what `{other}` may import"),
        }
    };
    let mut wrong = Vec::new();
    let packages = metadata["packages"].as_array().expect("packages");
    assert!(packages.len() >= 7);
    for package in packages {
        let name = package["name"].as_str().expect("a name");
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let other = dependency["name"].as_str().expect("a name");
            if other.starts_with("awqc") && !allowed(name).contains(&other) {
                wrong.push(format!("{name} imports {other}"));
            }
            if name == "awqc-ir" && (other.starts_with("burn") || other == "safetensors" || other == "gemm") {
                wrong.push(format!("{name} imports {other}"));
            }
        }
    }
    fail_if_any("ir <- frontends, ir <- passes <- exec <- awqc:", wrong);
}

#[test]
fn the_language_touches_no_files_and_libraries_do_not_print() {
    let mut found = Vec::new();
    for (path, text) in sources(&LIBRARIES) {
        for (line, code) in code(&text) {
            let printing = ["println!", "eprintln!", "print!(", "dbg!", "std::env::"].iter().any(|w| code.contains(w));
            let files = path.starts_with("ir") && ["std::fs", "std::io", "std::net"].iter().any(|w| code.contains(w));
            if printing || files {
                found.push(format!("{}:{line}: {}", path.display(), code.trim()));
            }
        }
    }
    fail_if_any("only the driver prints and reads the environment; ir knows no files:", found);
}

#[test]
fn model_names_stay_in_arch_files() {
    let mut families: Vec<String> = fs::read_dir(root().join("frontends/arch"))
        .expect("the arch folder")
        .flatten()
        .filter_map(|e| Some(e.path().file_stem()?.to_str()?.split('_').next()?.to_owned()))
        .collect();
    families.sort();
    families.dedup();
    // Also a subcommand, and a word of the template language.
    families.retain(|f| f != "opt");
    assert!(families.len() >= 8, "{families:?}");
    let mut found = Vec::new();
    let mut all = sources(&LIBRARIES);
    all.extend(sources(&["src"]));
    for (path, text) in all {
        if path.starts_with("frontends/src/arch.rs") {
            continue; // the one list of template files
        }
        for (line, code) in code(&text) {
            let lower = code.to_lowercase();
            let words = lower.split(|c: char| !c.is_ascii_alphanumeric());
            let named = words.into_iter().any(|w| families.iter().any(|f| f == w));
            if named || code.contains("_proj") || code.contains("self_attn") {
                found.push(format!("{}:{line}: {}", path.display(), code.trim()));
            }
        }
    }
    fail_if_any("a model's or tensor's name occurs only in frontends/arch and in tests:", found);
}

#[test]
fn matches_on_our_enums_are_exhaustive() {
    // A catch-all arm is allowed where the matched type is not ours: those name what they catch (`other`, `_other`).
    let mut found = Vec::new();
    for (path, text) in sources(&LIBRARIES) {
        let lines: Vec<(usize, &str)> = code(&text).collect();
        for (i, (line, code)) in lines.iter().enumerate() {
            if !code.trim_start().starts_with("_ =>") {
                continue;
            }
            let head = &lines[i.saturating_sub(40)..i];
            let ours = [
                "Op::",
                "WeightExpr::",
                "Elem::",
                "Dim::",
                "Operand::",
                "Layout::",
                "Law::",
                "RegionName::",
                "DataMap::",
            ];
            let start =
                head.iter().rposition(|(_, l)| l.contains("match ") && l.trim_end().ends_with('{')).unwrap_or(0);
            let indent = code.len() - code.trim_start().len();
            let arms = head[start..].iter().filter(|(_, l)| l.len() - l.trim_start().len() == indent);
            if arms.into_iter().any(|(_, l)| ours.iter().any(|o| l.trim_start().starts_with(o) && l.contains("=>"))) {
                found.push(format!("{}:{line}: {}", path.display(), code.trim()));
            }
        }
    }
    fail_if_any("matches on our enums list every variant:", found);
}

#[test]
fn the_tree_holds_nothing_of_the_machine_it_was_written_on() {
    let out = Command::new("git").args(["ls-files"]).current_dir(root()).output();
    let Ok(out) = out else { return };
    let mut found = Vec::new();
    for name in String::from_utf8_lossy(&out.stdout).lines().filter(|n| !n.ends_with(".lock")) {
        let Ok(text) = fs::read_to_string(root().join(name)) else { continue };
        for (i, line) in text.lines().enumerate() {
            let home = ["/ho", "me/"].concat();
            let work = ["/wo", "rk/"].concat();
            if line.contains(&home) || line.contains(&work) {
                found.push(format!("{name}:{}: {line}", i + 1));
            }
        }
    }
    fail_if_any("no machine paths:", found);
}
