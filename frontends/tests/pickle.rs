//! Files of `torch.save`: what PyTorch wrote is read, what is more than tensors is refused, and nothing is ever run.

#![allow(clippy::unwrap_used, reason = "tests")]

mod writer;

use std::fs;
use std::path::{Path, PathBuf};

use awqc_frontends::pickle::Pickled;
use awqc_frontends::safetensors::Safetensors;
use awqc_frontends::{ImportError, open};
use awqc_ir::TensorSource;
use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;
use writer::{folder, llama_config, llama_tensors, pickle, zip};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/pickled").join(name)
}

const FIXTURES: [&str; 6] = ["zip.bin", "ordered.pt", "old.pth", "protocol4.pt", "nested.pt", "distributed.pt"];

fn error(bytes: &[u8]) -> ImportError {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.bin");
    fs::write(&path, bytes).unwrap();
    let e = Pickled::open(&path).err().unwrap();
    assert!(e.to_string().contains("x.bin"), "{e}");
    e
}

#[test]
fn every_form_has_the_tensors_that_went_in() {
    let want = Safetensors::open(&fixture("tensors.safetensors")).unwrap();
    for name in FIXTURES {
        let got = Pickled::open(&fixture(name)).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(got.names(), want.names(), "{name}");
        for tensor in want.names() {
            let (got, want) = (got.read(&tensor).unwrap(), want.read(&tensor).unwrap());
            assert_eq!(got.info, want.info, "{name}: {tensor}");
            assert_eq!(got.bytes, want.bytes, "{name}: {tensor}");
        }
    }
}

#[test]
fn a_folder_a_file_and_shards_open() {
    let (dir, tensors) = (TempDir::new().unwrap(), llama_tensors());
    let path = |name: &str| dir.path().join(name);
    fs::write(path("config.json"), llama_config().to_string()).unwrap();
    fs::write(path("pytorch_model.bin"), zip(&pickle(&tensors), &tensors)).unwrap();
    let text = |p: &Path| awqc_ir::print(&open(p).unwrap_or_else(|e| panic!("{e}")).module);
    let whole = text(dir.path());
    for (name, t) in &tensors {
        assert_eq!(open(dir.path()).unwrap().source.read_f32(name).unwrap(), t.data, "{name}");
    }
    assert_eq!(text(&path("pytorch_model.bin")), whole);
    // The only file there is; what training leaves is none.
    fs::rename(path("pytorch_model.bin"), path("consolidated.00.pth")).unwrap();
    fs::write(path("training_args.bin"), "no tensors").unwrap();
    assert_eq!(text(dir.path()), whole);
    fs::write(path("other.pt"), "no tensors").unwrap();
    let e = open(dir.path()).err().unwrap().to_string();
    assert!(e.contains("consolidated.00.pth, other.pt") && e.contains("pytorch_model.bin.index.json"), "{e}");
    fs::remove_file(path("consolidated.00.pth")).unwrap();
    // Two shards, and any of them.
    let middle = tensors.keys().nth(tensors.len() / 2).unwrap().clone();
    let (mut first, mut map) = (tensors.clone(), serde_json::Map::new());
    let second = first.split_off(&middle);
    for (shard, tensors) in [("a.bin", &first), ("b.bin", &second)] {
        fs::write(path(shard), zip(&pickle(tensors), tensors)).unwrap();
        map.extend(tensors.keys().map(|t| (t.clone(), json!(shard))));
    }
    fs::write(path("pytorch_model.bin.index.json"), json!({"weight_map": map}).to_string()).unwrap();
    assert_eq!(text(dir.path()), whole);
    assert_eq!(text(&path("b.bin")), whole);
    map.insert(middle.clone(), json!("a.bin"));
    fs::write(path("pytorch_model.bin.index.json"), json!({"weight_map": map}).to_string()).unwrap();
    let e = open(dir.path()).err().unwrap().to_string();
    assert!(e.contains(&middle) && e.contains("another shard"), "{e}");
    // Safetensors win.
    folder(dir.path(), &llama_config(), &tensors);
    assert_eq!(text(dir.path()), whole);
}

#[test]
fn directories_of_large_archives_are_read() {
    // The last record says nothing, a record of 64-bit numbers does; the first entry's size is in an extra field.
    let tensors = llama_tensors();
    let small = zip(&pickle(&tensors), &tensors);
    let (body, end) = small.split_at(small.len() - 22);
    let number = |at: usize| u64::from(u32::from_le_bytes(*end[at..].first_chunk().unwrap()));
    let (size, start) = (number(12), number(16));
    let (data, directory) = body.split_at(start as usize);
    let mut directory = directory.to_vec();
    let (len, name) = (directory[24..28].to_vec(), usize::from(directory[28]));
    directory[20..28].fill(0xff);
    directory[30] = 20;
    let extra = [&[1, 0, 16, 0][..], &len, &[0; 4], &len, &[0; 4]].concat();
    directory.splice(46 + name..46 + name, extra);
    let record = [&b"PK\x06\x06"[..], &[0; 36], &(size + 20).to_le_bytes(), &start.to_le_bytes()].concat();
    let at = (data.len() + directory.len()) as u64;
    let locator = [&b"PK\x06\x07\0\0\0\0"[..], &at.to_le_bytes(), &[1, 0, 0, 0]].concat();
    let end = [&end[..8], &[0xff; 12], &[0, 0]].concat();
    let large = [data, &directory, &record, &locator, &end].concat();
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.bin");
    fs::write(&path, &large).unwrap();
    let source = Pickled::open(&path).unwrap();
    for (name, t) in &tensors {
        assert_eq!(source.read_f32(name).unwrap(), t.data, "{name}");
    }
    // A locator that leads nowhere.
    let lost = [data, &directory, &record, &locator[..8], &[0xff; 8], &locator[16..], &end].concat();
    assert!(error(&lost).to_string().contains("too early"));
    assert!(error(&[data, &directory, &[0; 20], &end].concat()).to_string().contains("nothing points to"));
}

#[test]
fn code_is_refused_by_name() {
    // What an attack looks like: a call of os.system with a command.
    let proof = TempDir::new().unwrap();
    let command = format!("touch {}", proof.path().join("ran").display());
    let mut attack = b"\x80\x02cposix\nsystem\nX".to_vec();
    attack.extend((command.len() as u32).to_le_bytes());
    attack.extend(command.bytes());
    attack.extend(b"\x85R.");
    let e = error(&zip(&attack, &writer::Tensors::new()));
    assert!(e.is_unsupported() && e.to_string().contains("`posix.system`") && e.to_string().contains("no code"), "{e}");
    for (pickle, says) in [
        (&b"\x80\x02cbuiltins\neval\n."[..], "`builtins.eval`"),
        (b"\x80\x02c__builtin__\ngetattr\n.", "`__builtin__.getattr`"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "`os.system`"),
        (b"\x80\x02ctorch\nload\n.", "`torch.load`"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n.", "`torch._utils._rebuild_tensor_v3`"),
        // Known names, used for something else.
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calling it"),
        (b"\x80\x02X\x01\x00\x00\x00a)R.", "no function"),
        (b"\x80\x02}X\x01\x00\x00\x00a)R.", "no function"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "unexpected arguments"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "0x81"),
        (b"\x80\x02(ios\nsystem\n.", "0x69"),
        // Attributes, but for those that PyTorch sets on dicts.
        (b"\x80\x02}}X\x01\x00\x00\x00aNsb.", "sets attributes"),
        (b"\x80\x02]}b.", "sets attributes"),
        (b"\x80\x02}.", "no dict of tensors"),
        (b"\x80\x02N.", "no dict of tensors"),
    ] {
        let e = error(&zip(pickle, &writer::Tensors::new())).to_string();
        assert!(e.contains(says), "{says} is not in: {e}");
    }
    assert!(!proof.path().join("ran").exists());
}

#[test]
fn what_is_broken_is_an_error_that_says_so() {
    for (pickle, says) in [
        (&b""[..], "too early"),
        (b"\x80\x02", "too early"),
        (b"\x80\x02X\xff\xff\xff\xffa", "too early"),
        (b"\x80\x02.", "empty stack"),
        (b"\x80\x02(.", "empty stack"),
        (b"\x80\x02(0.", "empty stack"),
        (b"\x80\x02t.", "empty stack"),
        (b"\x80\x02K\x01a.", "empty stack"),
        (b"\x80\x02K\x01K\x01a.", "no list"),
        (b"\x80\x02NK\x01K\x02s.", "no dict"),
        (b"\x80\x02}(K\x01u.", "no dict"),
        (b"\x80\x02h\x07.", "does not have"),
        (b"\x80\x02X\x01\x00\x00\x00\xff.", "UTF-8"),
        (b"\x80\x02NQ.", "no tensor's storage"),
        (b"\x80\x02\xfe.", "0xfe"),
        // A dict that holds itself.
        (b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.", "no dict of tensors"),
    ] {
        let e = error(&zip(pickle, &writer::Tensors::new())).to_string();
        assert!(e.contains(says), "{says} is not in: {e}");
    }
    let tensors = llama_tensors();
    let good = zip(&pickle(&tensors), &tensors);
    assert!(error(&good[..good.len() - 30]).to_string().contains("download it again"));
    assert!(error(b"{}").to_string().contains("no file of `torch.save`"));
    let mut tar = vec![0; 512];
    tar[257..262].copy_from_slice(b"ustar");
    assert!(error(&tar).to_string().contains("tar archive"));
    let old = fs::read(fixture("old.pth")).unwrap();
    assert!(error(&old[..old.len() - 8]).to_string().contains("too early"));
    // Tensors that reach beyond their storage, or have more elements than are stored.
    let mut short = tensors.clone();
    short.get_mut("model.norm.weight").unwrap().data.pop();
    assert!(error(&zip(&pickle(&tensors), &short)).to_string().contains("44 bytes for the 12 numbers"));
    short.remove("model.norm.weight");
    assert!(error(&zip(&pickle(&tensors), &short)).to_string().contains("has no storage"));
    let one = |shape: &[u8], strides: &[u8]| {
        let mut out = b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x01(".to_vec();
        shape.iter().for_each(|d| out.extend([b'K', *d]));
        out.extend(b"t(");
        strides.iter().for_each(|d| out.extend([b'K', *d]));
        out.extend(b"t\x89}tRs.");
        zip(
            &out,
            &writer::Tensors::from([(
                "w".to_owned(),
                writer::Tensor { shape: vec![4], data: vec![1.0, 2.0, 3.0, 4.0] },
            )]),
        )
    };
    assert!(error(&one(&[4], &[1])).to_string().contains("beyond its storage"));
    assert!(error(&one(&[2, 2], &[1, 2])).to_string().contains("beyond its storage"));
    assert!(error(&one(&[200, 200], &[0, 0])).to_string().contains("expanded view"));
    assert!(error(&one(&[2], &[])).to_string().contains("unexpected arguments"));
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.bin");
    fs::write(&path, one(&[2, 1], &[2, 9])).unwrap();
    assert_eq!(Pickled::open(&path).unwrap().read_f32("w").unwrap(), [2.0, 4.0]);
}

fn exercise(bytes: &[u8]) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.bin");
    fs::write(&path, bytes).unwrap();
    if let Ok(source) = Pickled::open(&path) {
        for name in source.names() {
            let _ = source.read(&name);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn changed_files_are_no_crash(which in 0..FIXTURES.len(), changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in prop::option::of(any::<prop::sample::Index>())) {
        let mut bytes = fs::read(fixture(FIXTURES[which])).unwrap();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        exercise(&bytes);
    }

    #[test]
    fn any_opcodes_are_no_crash(program in prop::collection::vec(prop_oneof![
        Just(b"}".to_vec()), Just(b"]".to_vec()), Just(b")".to_vec()), Just(b"(".to_vec()), Just(b"t".to_vec()), Just(b"u".to_vec()), Just(b"s".to_vec()),
        Just(b"a".to_vec()), Just(b"e".to_vec()), Just(b"q\x01".to_vec()), Just(b"h\x01".to_vec()), Just(b"2".to_vec()), Just(b"0".to_vec()), Just(b"b".to_vec()),
        Just(b"R".to_vec()), Just(b"Q".to_vec()), Just(b"\x85".to_vec()), Just(b"\x86".to_vec()), Just(b"\x87".to_vec()), Just(b"K\x03".to_vec()),
        Just(b"X\x05\x00\x00\x00model".to_vec()), Just(b"X\x07\x00\x00\x00storage".to_vec()), Just(b"ctorch\nFloatStorage\n".to_vec()),
        Just(b"ctorch._utils\n_rebuild_tensor_v2\n".to_vec()), Just(b"ccollections\nOrderedDict\n".to_vec()), any::<u8>().prop_map(|b| vec![b]),
    ], 0..60)) {
        exercise(&zip(&[&b"\x80\x02"[..], &program.concat(), b"."].concat(), &writer::Tensors::new()));
    }
}
