//! Settings, and single weights as other programs pack them (`cargo xtask goldens` made the file).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::safetensors::Safetensors;

fn scheme(q: Json) -> Result<Option<Scheme>, ImportError> {
    Scheme::of_config(Path::new("config.json"), json!({"quantization_config": q}).as_object().unwrap())
}

#[test]
fn what_is_not_read_is_refused_by_name() {
    let weights = |key: &str, value: Json| {
        let mut weights = json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32});
        weights[key] = value;
        json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": weights}}})
    };
    let with = |key: &str, value: Json| {
        let mut config = weights("symmetric", json!(true));
        config[key] = value;
        config
    };
    for (q, word) in [
        (json!({"quant_method": "bitsandbytes"}), "`bitsandbytes`"),
        (json!({"bits": 4}), "does not name"),
        (json!({"quant_method": "awq", "version": "marlin"}), "`marlin`"),
        (json!({"quant_method": "awq", "zero_point": false}), "without zero points"),
        (json!({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}), "`marlin`"),
        (json!({"quant_method": "gptq", "bits": 4, "is_marlin_format": true}), "`marlin`"),
        (json!({"quant_method": "gptq", "bits": 3, "sym": false}), "gptq_v2"),
        (json!({"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}), "`int16`"),
        (json!({"quant_method": "gptq", "bits": 4, "dynamic": {".*down.*": {"bits": 8}}}), "`.*down.*`"),
        (weights("type", json!("float")), "`float` numbers"),
        (weights("strategy", json!("block")), "strategy `block`"),
        (weights("actorder", json!("sorted")), "`actorder` `sorted`"),
        (weights("dynamic", json!(true)), "`dynamic`"),
        (with("format", json!("float-quantized")), "`float-quantized`"),
        (with("format", json!("marlin-24")), "`marlin-24`"),
        (with("sparsity_config", json!({"format": "sparse-24-bitmask"})), "`sparse-24-bitmask`"),
        (with("kv_cache_scheme", json!({"num_bits": 8})), "`kv_cache_scheme`"),
        (
            with("config_groups", json!({"g": {"weights": {}, "input_activations": {"num_bits": 8}}})),
            "`input_activations`",
        ),
    ] {
        let e = scheme(q).unwrap_err();
        assert!(e.is_unsupported() && e.to_string().contains(word), "{e}");
        assert!(e.to_string().contains("float model"), "{e}");
    }
}

#[test]
fn wrong_settings_are_named() {
    for (q, word) in [
        (json!("awq"), "`quantization_config`"),
        (json!({"quant_method": "awq", "bits": "four"}), "`quantization_config.bits`"),
        (json!({"quant_method": "awq", "group_size": 0}), "`quantization_config.group_size`"),
        (json!({"quant_method": "gptq"}), "`quantization_config.bits`"),
        (json!({"quant_method": "gptq", "bits": 5}), "2, 3, 4, 8"),
        (json!({"quant_method": "gptq", "bits": 4, "sym": 1}), "`quantization_config.sym`"),
        (json!({"quant_method": "compressed-tensors"}), "`quantization_config.config_groups`"),
        (
            json!({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 7}}}}),
            "`quantization_config.config_groups.g.weights.num_bits`",
        ),
        (
            json!({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "group"}}}}),
            "group_size",
        ),
    ] {
        let e = scheme(q).unwrap_err();
        assert!(!e.is_unsupported() && e.to_string().contains(word), "{e}");
    }
}

#[test]
fn the_older_files_have_other_keys() {
    let q = json!({"zero_point": true, "q_group_size": 32, "w_bit": 4, "version": "GEMM"});
    let Scheme::Awq(awq) =
        Scheme::read(Path::new("quant_config.json"), "", q.as_object().unwrap(), Some("awq")).unwrap()
    else {
        panic!("not awq");
    };
    assert_eq!(awq.quant.group, awqc_ir::Group::Size(32));
    let q = json!({"bits": 4, "group_size": 64, "desc_act": false, "sym": false, "damp_percent": 0.01});
    let Scheme::Gptq(gptq) =
        Scheme::read(Path::new("quantize_config.json"), "", q.as_object().unwrap(), Some("gptq")).unwrap()
    else {
        panic!("not gptq");
    };
    assert_eq!(gptq.quant.to_string(), "u4g64");
}

/// Settings of each weight in the file, and the file.
fn cases() -> (BTreeMap<String, String>, Arc<Safetensors>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/packed_cases.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    (header.metadata().clone().unwrap().into_iter().collect(), Arc::new(Safetensors::open(&path).unwrap()))
}

fn packed(name: &str, settings: &str, file: &Safetensors) -> (Type, Result<Packed, String>) {
    let settings: Json = serde_json::from_str(settings).unwrap();
    let scheme = Scheme::read(Path::new("config.json"), "", settings.as_object().unwrap(), None).unwrap();
    let shape = file.info(&format!("{name}|codes")).unwrap().shape;
    let float = Type::new(Elem::F16, shape.iter().map(|d| Dim::Const(*d as u64)));
    let found = scheme.packed(name, &float, file);
    (float, found)
}

#[test]
fn codes_scales_and_zero_points_are_those_that_went_in() {
    let (cases, file) = cases();
    assert!(cases.len() > 30, "{}", cases.len());
    for (name, settings) in &cases {
        let (float, found) = packed(name, settings, &file);
        let found = found.unwrap_or_else(|e| panic!("{name}: {e}"));
        let ty = found.ty(&float);
        let Held::Recoded(weight) = found.held else { panic!("{name} is in a layout of the language") };
        let (quant, scattered, parts) = (weight.quant, weight.scattered.is_some(), weight.parts());
        let source = Unpacked::new(file.clone(), BTreeMap::from([(name.clone(), weight)]), found.tensors.clone());
        assert_eq!((ty.is_none(), scattered), (name.contains("order"), name.contains("order")), "{name}");
        let bytes = |part: &str| file.read(&format!("{name}|{part}")).unwrap().bytes;
        if scattered {
            let read = source.read(&format!("{name}.weight")).unwrap();
            assert_eq!(read.bytes, bytes("floats"), "{name}");
            assert_eq!(source.info(&format!("{name}.weight")), Some(read.info));
            assert!(source.read(&format!("{name}.codes")).is_err());
            continue;
        }
        for (suffix, info) in parts {
            let read = source.read(&format!("{name}{suffix}")).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(read.info, info);
            match suffix {
                ".codes" => {
                    let width = info.shape[1];
                    let bit = |row: usize, at: usize| read.bytes[row * width + at / 8] >> (at % 8) & 1;
                    let bits = usize::from(quant.bits);
                    let code = |row: usize, col: usize| (0..bits).map(|b| bit(row, col * bits + b) << b).sum::<u8>();
                    let want = bytes("codes");
                    let cols = want.len() / info.shape[0];
                    for (at, code_in) in want.iter().enumerate() {
                        assert_eq!(code(at / cols, at % cols), *code_in, "{name}: code {at}");
                    }
                }
                ".scales" => assert_eq!(read.bytes, bytes("scales"), "{name}"),
                _ => assert_eq!(read.bytes, bytes("zeros"), "{name}"),
            }
        }
        assert_eq!(quant.symmetric, !source.names().contains(&format!("{name}.zeros")), "{name}");
        let hidden = |part: &String| source.read(part).is_err() || part.ends_with(".scales");
        assert!(found.tensors.iter().all(hidden), "{name}");
    }
}

/// A source in which one tensor is another.
struct Changed(Arc<Safetensors>, String, Option<awqc_ir::RawTensor>);

impl TensorSource for Changed {
    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn info(&self, name: &str) -> Option<awqc_ir::TensorInfo> {
        if name == self.1 { self.2.as_ref().map(|t| t.info.clone()) } else { self.0.info(name) }
    }

    fn read(&self, name: &str) -> Result<awqc_ir::RawTensor, awqc_ir::TensorError> {
        match &self.2 {
            Some(tensor) if name == self.1 => Ok(tensor.clone()),
            _ => self.0.read(name),
        }
    }
}

#[test]
fn parts_that_do_not_fit_are_named() {
    let (cases, file) = cases();
    let bytes = |values: &[i32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let i32s = |values: &[i32], shape: &[usize]| awqc_ir::RawTensor {
        info: awqc_ir::TensorInfo { stored: Stored::I32, shape: shape.to_vec() },
        bytes: bytes(values),
    };
    for (name, part, tensor, says) in [
        ("gptq-order", ".g_idx", None, "`desc_act`"),
        ("gptq-order", ".g_idx", Some(i32s(&[4; 64], &[64])), "beyond the 4"),
        ("gptq-4-True-False", ".qzeros", Some(i32s(&[0x7777_7776; 16], &[4, 4])), "`sym`"),
        ("gptq-4-True-False", ".qweight", None, "is missing"),
        ("gptq-4-True-False", ".scales", Some(i32s(&[1; 128], &[4, 32])), "f16 or bf16 or f32 [4, 32] is needed"),
        ("ct-4-False-new", ".weight_zero_point", None, "`ct-4-False-new.weight_zero_point` is missing"),
        ("ct-4-False-new", ".weight_shape", Some(i32s(&[64, 32], &[2])), "says [64, 32]"),
        ("ct-4-True-new", ".weight_zero_point", Some(i32s(&[0; 16], &[4, 4])), "symmetric"),
        ("ct-order", ".weight_g_idx", None, "`actorder`"),
    ] {
        let source = Changed(file.clone(), format!("{name}{part}"), tensor);
        let settings: Json = serde_json::from_str(&cases[name]).unwrap();
        let scheme = Scheme::read(Path::new("config.json"), "", settings.as_object().unwrap(), None).unwrap();
        let shape = file.info(&format!("{name}|codes")).unwrap().shape;
        let float = Type::new(Elem::F16, shape.iter().map(|d| Dim::Const(*d as u64)));
        let e = scheme.packed(name, &float, &source).unwrap_err();
        assert!(e.contains(says), "{name}: {e}");
    }
    // Numbers that no code can stand for are found when they are read.
    for (name, part, stored, value, says) in [
        ("gemv_fast-32", ".qzeros", Stored::F16, half::f16::from_f32(0.5).to_le_bytes().to_vec(), "a zero point of"),
        ("ct-bf16", ".weight_scale", Stored::Bf16, half::bf16::from_f32(1e6).to_le_bytes().to_vec(), "f16"),
        ("ct-bf16", ".weight_scale", Stored::Bf16, half::bf16::from_f32(1e-30).to_le_bytes().to_vec(), "f16"),
        ("ct-bf16", ".weight_scale", Stored::Bf16, half::bf16::NAN.to_le_bytes().to_vec(), "NaN"),
    ] {
        let mut tensor = file.read(&format!("{name}{part}")).unwrap();
        assert_eq!(tensor.info.stored, stored);
        tensor.bytes[..2].copy_from_slice(&value);
        let (_, found) = packed(name, &cases[name], &file);
        let Held::Recoded(weight) = found.unwrap().held else { panic!("as it is") };
        let source = Changed(file.clone(), format!("{name}{part}"), Some(tensor));
        let shown = Unpacked::new(Arc::new(source), BTreeMap::from([(name.to_owned(), weight)]), Vec::new());
        let suffix = if part == ".qzeros" { ".zeros" } else { ".scales" };
        let e = shown.read(&format!("{name}{suffix}")).unwrap_err().0;
        assert!(e.contains(says) && e.contains(part), "{e}");
    }
}
