//! Random weights: every family's configuration can do without a checkpoint.
#![allow(missing_docs, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};

use awqc_frontends::{open, open_random};
use awqc_ir::verify::verify;
use awqc_ir::{Op, Stored};

fn goldens() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let mut found: Vec<PathBuf> = fs::read_dir(root).expect("the goldens").flatten().map(|e| e.path()).collect();
    found.retain(|p| p.join("config.json").is_file());
    found.sort();
    found
}

#[test]
fn every_configuration_gives_the_module_of_its_checkpoint() {
    let (mut seen, mut without) = (0, 0);
    for folder in goldens() {
        let config = fs::read_to_string(folder.join("config.json")).expect("a config");
        let made = open_random(&folder, 1);
        if config.contains("quantization_config") {
            let error = made.err().expect("packed weights are not made").to_string();
            assert!(error.contains("quantization_config"), "{error}");
            continue;
        }
        let Ok(real) = open(&folder) else { panic!("{} cannot be opened", folder.display()) };
        // Checkpoints in several folders have configurations of their own for each.
        let made = match made {
            Ok(made) => made,
            Err(_) if fs::read_dir(&folder).expect("a folder").flatten().any(|e| e.path().is_dir()) => continue,
            Err(error) => panic!("{}: {error}", folder.display()),
        };
        seen += 1;
        verify(&made.module).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let names = |m: &awqc_frontends::Imported| -> Vec<String> { m.source.names() };
        let (want, got) = (names(&real), names(&made));
        // Of what a configuration does not mention, nothing is made.
        let absent: Vec<&String> = want.iter().filter(|n| !got.contains(n)).collect();
        assert!(absent.iter().all(|n| n.contains("bias")), "{}: {absent:?}", folder.display());
        assert_eq!(got.len() + absent.len(), want.len(), "{}: {got:?}", folder.display());
        without += usize::from(!absent.is_empty());
        for name in got {
            // Convolutions are made as the matrices that they are read as.
            let size = |m: &awqc_frontends::Imported| m.source.info(&name).map(|i| i.shape.iter().product::<usize>());
            assert_eq!(size(&real), size(&made), "{}: {name}", folder.display());
        }
    }
    assert!(seen >= 25 && without <= 3, "{seen} families, {without} of them without some biases");
}

#[test]
fn the_same_seed_gives_the_same_numbers() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama");
    let [one, same, other] = [5, 5, 6].map(|seed| open_random(&folder.join("config.json"), seed).expect("a model"));
    assert!(one.notes.iter().any(|n| n.contains("random (seed 5)")), "{:?}", one.notes);
    let mut differ = 0;
    for name in one.source.names() {
        let read = |m: &awqc_frontends::Imported| m.source.read(&name).expect("a tensor");
        assert_eq!(read(&one).bytes, read(&same).bytes, "{name}");
        differ += usize::from(read(&one).bytes != read(&other).bytes);
        assert_eq!(read(&one).info.stored, Stored::Bf16, "{name}");
        // What is read as floats is what is stored.
        let floats = one.source.read_f32(&name).expect("floats");
        assert_eq!(read(&one).to_f32(), Some(floats), "{name}");
    }
    // All but the gains of norms.
    let region = &one.module.regions[1];
    let gains = region.nodes().filter(|(_, n)| matches!(n.op, Op::RmsNorm(_)));
    for (_, node) in gains {
        let weight = node.operands[1].weight().expect("a gain");
        for name in region.sources(weight) {
            let gain = one.source.read_f32(&region.tensor_name(&name)).expect("a gain");
            assert!(gain.iter().all(|g| *g == 1.0), "{gain:?}");
        }
    }
    assert_eq!(differ, one.source.names().len() - 5);
}

#[test]
fn what_is_no_configuration_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let error = open_random(dir.path(), 0).err().expect("nothing there").to_string();
    assert!(error.contains("config.json"), "{error}");
    let write = |text: &str| fs::write(dir.path().join("config.json"), text).expect("written");
    for (text, message) in [
        ("{}", "architectures"),
        ("[]", "not a JSON object"),
        (r#"{"architectures":["LlamaForCausalLM"],"torch_dtype":"int8"}"#, "torch_dtype"),
        (r#"{"architectures":["LlamaForCausalLM"]}"#, "hidden_size"),
    ] {
        write(text);
        let error = open_random(dir.path(), 0).err().expect("no model").to_string();
        assert!(error.contains(message), "{text}: {error}");
    }
    // More than any memory holds is refused when it is read.
    let mut config: serde_json::Value = serde_json::from_slice(
        &fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/llama/config.json")).expect("a config"),
    )
    .expect("JSON");
    config["vocab_size"] = 2_000_000_000.into();
    write(&config.to_string());
    let model = open_random(dir.path(), 0).expect("a shape");
    let large = model.source.names().into_iter().find(|n| n.contains("embed")).expect("a table");
    let error = model.source.read_f32(&large).expect_err("too large").to_string();
    assert!(error.contains("too large"), "{error}");
}
