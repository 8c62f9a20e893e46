//! CUDA artefacts: whole models through the text of their kernels, on a CPU that plays a GPU.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use awqc::burn::ProfileOn;
use awqc::calibration::Calibration;
use awqc::compile::{Request, compile};
use awqc::cuda::{Lowered, Session, lower};
use awqc::exec::Logits;
use awqc::exec::emit::Existing;
use awqc::interrupt::Interrupt;
use awqc::ir::verify::verify;
use awqc::ir::{Group, Op, Quant};
use awqc::model::Model;
use awqc::standard::registry;
use awqc::statistics::Statistics;
use awqc::target::{Method, Target};
use awqc::watch::Watch;

use crate::cli::{Done, path, scratch};
use crate::emulator::{Emulator, arch};
use crate::images::{photo, ready};
use crate::models::{Expected, float_folders, largest_difference, name, reference, seen};

/// The fusions and the layout, with or without quantization.
const FLOAT: &str = "canonicalize,dce,fuse-qkv,fuse-gate-up,fuse-norm,fuse-rope,fuse-swiglu,dce";
const PACKED: &str = "canonicalize,dce,quantize{SCHEME},fuse-qkv,fuse-gate-up,fuse-norm,fuse-rope,fuse-swiglu,dce,\
                      pack{layout=mma16}";

/// Why a model is refused, if it is: there are no kernels for text that attends to images.
fn refused(folder: &Path) -> Option<&'static str> {
    let model = Model::open(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut ops = model.module.regions.iter().flat_map(|r| r.nodes()).map(|(_, n)| &n.op);
    ops.any(|op| matches!(op, Op::CrossSdpa(_))).then_some("attention of a text to images has no kernels here")
}

/// Compiles a golden into `out` and opens the artefact; nothing if it is refused as it has to be.
fn artefact(folder: &Path, out: PathBuf, pipeline: &str, quant: Quant) -> Option<Model> {
    let request = Request {
        registry: &registry(),
        model: folder,
        random: None,
        target: Target::find(&format!("cuda-sm{}", arch().sm)).expect("a target"),
        quant,
        mixed: None,
        method: Method::default(),
        head_bits: 16,
        pipeline: Some(pipeline.into()),
        calibration: Calibration::Builtin,
        samples: 1,
        seqlen: 8,
        statistics: Statistics::Gather,
        profile_on: ProfileOn::Host,
        out: out.clone(),
        existing: Existing::Refuse,
        resume: false,
        watch: &Watch::default(),
        interrupt: &Interrupt::default(),
        nvrtc: &[],
        quiet: true,
    };
    match compile(&request) {
        Ok(_) => Some(Model::open(&out).unwrap_or_else(|e| panic!("{}: {e}", folder.display()))),
        Err(error) => {
            let why = refused(folder).unwrap_or_else(|| panic!("{}: {error}", folder.display()));
            assert!(error.message.contains(why), "{error}");
            None
        }
    }
}

fn lowered(model: &Model) -> Lowered {
    let module = verify(&model.module).expect("a valid module");
    lower(module, model.source.as_ref(), arch()).expect("a plan")
}

/// Compiles goldens, one emulator for all of them, and compares: with PyTorch, or with the reference executor on the
/// same artefact; whole sequences, and step by step.
fn compare(folders: &[PathBuf], pipeline: &str, quant: Quant, bound: f32) {
    let dir = tempfile::tempdir().expect("a folder");
    let models: Vec<(String, Model, Expected)> = folders
        .iter()
        .filter_map(|f| Some((name(f), artefact(f, dir.path().join(name(f)), pipeline, quant)?, Expected::read(f))))
        .collect();
    assert_eq!(models.len(), folders.iter().filter(|f| refused(f).is_none()).count());
    let plans: Vec<Lowered> = models.iter().map(|(_, m, _)| lowered(m)).collect();
    let emulator = Emulator::build(plans.iter().flat_map(|p| &p.kernels));
    for ((name, model, expected), lowered) in models.iter().zip(plans) {
        let (ids, text) = (expected.ids().remove(0), expected.text().remove(0));
        let rows = seen(model, expected);
        let image = |kernel: &str| emulator.image(kernel);
        let mut cuda = Session::new(lowered.plan, model.source.as_ref(), image, emulator.device(), 64)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let begin = |cuda: &mut Session| match &rows {
            Some(rows) => cuda.see(rows).unwrap_or_else(|e| panic!("{name}: {e}")),
            None => cuda.reset(),
        };
        let want = match pipeline == FLOAT {
            true => expected.floats["logits"].1[..ids.len() * cuda.plan().vocabulary].to_vec(),
            false => {
                reference(model, expected).forward(&ids, Logits::All).unwrap_or_else(|e| panic!("{name}: {e}")).data
            }
        };
        begin(&mut cuda);
        let scale = want.iter().fold(1.0f32, |m, v| m.max(v.abs()));
        let got = cuda.forward(&ids, Logits::All).unwrap_or_else(|e| panic!("{name}: {e}"));
        let worst = largest_difference(&got.data, &want);
        assert!(worst <= bound * scale, "{name}: logits differ by {worst} of {scale}");

        // Step by step, as the reference takes them: some frequencies depend on the length.
        begin(&mut cuda);
        let mut steps = reference(model, expected);
        for (i, part) in [&ids[..ids.len() - 2], &text[..1], &text[1..2], &text[2..3]].into_iter().enumerate() {
            let got = cuda.forward(part, Logits::Last).unwrap_or_else(|e| panic!("{name}: {e}"));
            let want = steps.forward(part, Logits::Last).unwrap_or_else(|e| panic!("{name}: {e}"));
            let worst = largest_difference(&got.data, &want.data);
            assert!(worst <= bound * scale, "{name}: part {i} differs by {worst} of {scale}");
        }
        // The device chooses the token with the largest logit.
        let logits = steps.forward(&text[3..4], Logits::Last).unwrap_or_else(|e| panic!("{name}: {e}"));
        let next = cuda.next(text[3]).unwrap_or_else(|e| panic!("{name}: {e}"));
        let largest = logits.data.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
        assert!(
            logits.data[next as usize] >= largest - 2.0 * bound * scale,
            "{name}: token {next} is not the likeliest"
        );
        assert_eq!(cuda.position(), ids.len() + 2, "{name}");
        // And those with the largest ones, in order.
        let logits = {
            cuda.reset();
            cuda.forward(&text[..1], Logits::Last).unwrap_or_else(|e| panic!("{name}: {e}")).data
        };
        cuda.reset();
        let count = 5.min(logits.len() - 1);
        let largest =
            cuda.largest(text[0], count).unwrap_or_else(|e| panic!("{name}: {e}")).expect("few are asked for");
        let mut sorted: Vec<(usize, f32)> = logits.iter().copied().enumerate().collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        assert_eq!(largest, sorted[..count], "{name}");
        assert_eq!(cuda.largest(text[0], logits.len()).expect("nothing is computed"), None, "{name}");
        assert_eq!(cuda.position(), 1, "{name}");
    }
}

#[test]
fn every_family_computes_what_pytorch_does() {
    // The caches are f16.
    compare(&float_folders(), FLOAT, Quant { bits: 4, symmetric: false, group: Group::Size(16) }, 2e-3);
}

#[test]
fn packed_models_compute_what_the_reference_does() {
    let some = |n: &str| float_folders().into_iter().filter(|f| name(f) == n).collect::<Vec<_>>();
    for (name, bits, group) in [
        ("llama", 4, 32),
        ("gpt2", 3, 16),
        ("gemma2", 8, 48),
        ("mixtral", 4, 16),
        ("qwen2_moe", 4, 32),
        ("deepseek_v3", 8, 16),
        ("phimoe", 3, 16),
        ("llava", 4, 16),
        ("vila", 4, 32),
    ] {
        compare(&some(name), PACKED, Quant { bits, symmetric: bits == 3, group: Group::Size(group) }, 3e-3);
    }
}

/// A token reads all of a model's matrices but the embedding's, and of experts those that it goes to.
#[test]
fn a_token_reads_the_experts_that_it_goes_to() {
    let folder = float_folders().into_iter().find(|f| name(f) == "mixtral").expect("a golden");
    let quant = Quant { bits: 4, symmetric: false, group: Group::Size(16) };
    let dir = tempfile::tempdir().expect("a folder");
    let float = artefact(&folder, dir.path().join("float"), FLOAT, quant).expect("an artefact");
    // In each layer q 48, k and v 16 of 32 channels, o 32 of 48, the router 4 of 32; and the head, 160 of 32.
    let shared = 2 * (48 * 32 + 2 * 16 * 32 + 32 * 48 + 4 * 32) + 160 * 32;
    // In each layer two of four experts, three matrices of 32 by 32.
    let chosen = 2 * 2 * 3 * 32 * 32;
    assert_eq!(lowered(&float).plan.bytes_per_token, 2 * (shared + chosen));
    // Experts are chosen, and their rows brought together again, without a word to the host.
    let packed = artefact(&folder, dir.path().join("packed"), PACKED, quant).expect("an artefact");
    let lowered = lowered(&packed);
    let names = |launches: &[awqc::cuda::plan::Launch]| -> Vec<String> {
        let name = |l: &awqc::cuda::plan::Launch| lowered.plan.kernels[l.kernel].name.clone();
        launches.iter().map(name).map(|n| n[..n.len() - 9].to_owned()).collect()
    };
    let few = names(&lowered.plan.body.few);
    let layer = few.iter().position(|n| n.starts_with("softmax")).expect("a choice");
    let want = [
        "softmax_choose_copy",
        "gemv_u4g16_64x32_2of4_shared",
        "silu",
        "gemv_u4g16_32x32_2of4",
        "combine_add_rms_norm",
    ];
    assert_eq!(few[layer..][..want.len()], want, "{few:?}");
    let many = names(&lowered.plan.body.many);
    assert!(many.iter().any(|n| n == "route_2of4_64"), "{many:?}");
    assert!(many.iter().any(|n| n == "gemm64_u4g16_64x32_2of4_shared_runs"), "{many:?}");
}

/// Runs the program with the emulator as the system's driver.
fn awqc(args: &[&str], emulator: &Emulator, settings: &[(&str, &str)]) -> Done {
    let mut command = Command::new(env!("CARGO_BIN_EXE_awqc"));
    command.args(args).env("LD_LIBRARY_PATH", emulator.folder()).env_remove("AWQC_NVRTC");
    Done::of(command.envs(settings.iter().copied()))
}

/// A driver that knows the kernels of an artefact: they are linked in, and it looks at no machine code.
fn driver_of(artefact: &str) -> Emulator {
    let Lowered { kernels, .. } = lowered(&Model::open(Path::new(artefact)).expect("an artefact"));
    for kernel in &kernels {
        fs::write(Path::new(artefact).join(format!("kernels/{}.cubin", kernel.name)), b"none").expect("written");
    }
    Emulator::emulated(&kernels)
}

/// Every file below a folder, with its contents.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut paths: Vec<PathBuf> = fs::read_dir(dir).expect("a folder").flatten().map(|e| e.path()).collect();
    paths.sort();
    let read = |p: PathBuf| (p.file_name().expect("a name").into(), fs::read(&p).expect("a file"));
    paths.into_iter().filter(|p| p.is_file()).map(read).collect()
}

#[test]
fn the_program_compiles_and_runs_mixtures_of_experts() {
    let dir = tempfile::tempdir().expect("a folder");
    let none = Emulator::emulated([]);
    for model in ["mixtral", "qwen2_moe"] {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(model);
        let (folder, ids) = (root.to_str().expect("UTF-8"), root.join("expected.safetensors"));
        let ids = ids.to_str().expect("UTF-8");
        let out = |sm: u32| dir.path().join(format!("{model}-{sm}")).to_str().expect("UTF-8").to_owned();
        for sm in [80, 86, 89, 90] {
            let target = format!("cuda-sm{sm}");
            let made = ["compile", folder, "--target", &target, "--calib-ids", ids, "--group", "16", "-o", &out(sm)];
            let done = awqc(&made, &none, &[]);
            assert_eq!(done.code, 0, "{model}, {target}: {}", done.err);
        }
        let out = out(89);
        let emulator = driver_of(&out);
        let perplexity = |device: &str| {
            let done = awqc(&["eval", &out, "--ids", ids, "--json", "-q", "--device", device], &emulator, &[]);
            assert_eq!(done.code, 0, "{model}, {device}: {}", done.err);
            let json: serde_json::Value = serde_json::from_str(&done.out).expect("JSON");
            json["perplexity"].as_f64().expect("a number")
        };
        let (device, host) = (perplexity("cuda"), perplexity("host"));
        assert!((device / host - 1.0).abs() < 1e-3, "{model}: {device} against {host}");
        let done =
            awqc(&["bench", &out, "--device", "cuda", "-p", "9", "-n", "3", "-r", "1", "--json"], &emulator, &[]);
        assert_eq!(done.code, 0, "{model}: {}", done.err);
        assert!(done.out.contains("tg3"), "{model}: {}", done.out);
    }
}

/// The eye looks at images on the processor; the text behind it runs on the device.
#[test]
fn the_program_shows_images_to_a_model_on_the_device() {
    let dir = scratch();
    let (model, ids) = ready(&dir, "llava");
    let (out, images) = (path(&dir, "out"), [photo(&dir, "a.png"), photo(&dir, "bcd.png")]);
    let none = Emulator::emulated([]);
    let compile = ["compile", &model, "--target", "cuda-sm89", "--calib-ids", &ids, "--group", "16", "-o", &out];
    let done = awqc(&compile, &none, &[]);
    assert_eq!(done.code, 0, "{}", done.err);
    let emulator = driver_of(&out);
    let run = |device: &str, images: &[String]| {
        let prompt = ["run", &out, "--prompt", "w5 <image> w6 w7", "--max-tokens", "6", "--json", "-q"];
        let images: Vec<&str> = images.iter().flat_map(|image| ["--image", image]).collect();
        awqc(&[&prompt[..], &["--device", device], &images].concat(), &emulator, &[])
    };
    let mut texts = Vec::new();
    for image in &images {
        let [cuda, host] = ["cuda", "host"].map(|device| run(device, std::slice::from_ref(image)));
        assert_eq!((cuda.code, host.code), (0, 0), "{}{}", cuda.err, host.err);
        assert_eq!(cuda.out, host.out);
        texts.push(cuda.out);
    }
    assert_ne!(texts[0], texts[1], "the image makes no difference");
    let args = ["run", &out, "--prompt", "w1 w159", "--max-tokens", "2", "--device", "cuda"];
    let done = awqc(&args, &emulator, &[]);
    assert_eq!(done.code, 4, "{}", done.err);
    assert!(done.err.contains("1 image tokens (159), 0 images"), "{}", done.err);
}

#[test]
fn the_program_compiles_runs_and_explains_what_it_cannot() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama");
    let (model, ids) = (root.to_str().expect("UTF-8"), root.join("expected.safetensors"));
    let ids = ids.to_str().expect("UTF-8");
    let none = Emulator::emulated([]);
    let compile = |out: &str, more: &[&str]| {
        let args = ["compile", model, "--target", "cuda-sm89", "--calib-ids", ids, "-o", out];
        awqc(&[&args, more].concat(), &none, &[])
    };
    let out = at("out");
    let done = compile(&out, &["--group", "16"]);
    assert_eq!(done.code, 0, "{}", done.err);
    let kernels = dir.path().join("out/kernels");
    assert!(kernels.join("plan.json").is_file());
    let compiled = kernels.join("resources.json").is_file();
    assert!(compiled || done.err.contains("note: NVRTC was not found"), "{}", done.err);
    let other = at("other");
    let args = ["compile", model, "--target", "cuda-sm89", "--calib-ids", ids, "--group", "16", "-o", &other, "-q"];
    let done = awqc(&args, &none, &[("AWQC_NVRTC", "no-such-folder")]);
    assert_eq!(done.code, 0, "{}", done.err);
    let warned = done.err.contains("warning: AWQC_NVRTC=no-such-folder: no usable NVRTC");
    assert!(compiled != warned, "{}", done.err);
    assert!(files(&kernels) == files(&dir.path().join("other/kernels")), "the same input gives the same kernels");
    // A shape that no kernel covers is found before any work.
    let done = compile(&at("none"), &["--group", "20"]);
    assert_eq!(done.code, 3, "{}", done.err);
    assert!(done.err.contains("no kernel covers u4g20[") && done.err.contains("help: another --group"), "{}", done.err);
    assert!(!dir.path().join("none").exists());

    let emulator = driver_of(&out);
    let eval = |more: &[&str], settings: &[(&str, &str)]| {
        awqc(&[&["eval", &out, "--ids", ids, "--json", "-q"], more].concat(), &emulator, settings)
    };
    let perplexity = |done: Done| {
        assert_eq!(done.code, 0, "{}", done.err);
        let json: serde_json::Value = serde_json::from_str(&done.out).expect("JSON");
        json["perplexity"].as_f64().expect("a number")
    };
    let (device, host) = (perplexity(eval(&[], &[])), perplexity(eval(&["--device", "host"], &[])));
    assert!((device / host - 1.0).abs() < 1e-3, "{device} against {host}");
    for (more, settings, code, message) in [
        (
            &[][..],
            ("EMULATOR_DEVICES", "0"),
            3,
            "finds no device\nhelp: run the artefact on a machine with an NVIDIA GPU",
        ),
        (
            &[],
            ("EMULATOR_SM", "90"),
            3,
            "for sm_89, this device (a CPU that plays a GPU) is sm_90\nhelp: compile with --target cuda-sm90",
        ),
        (&[], ("EMULATOR_SM", "86"), 3, "is sm_86"),
        (&[], ("EMULATOR_MEGABYTES", "0"), 6, "bytes of device memory"),
        (&["--ctx", "3"], ("EMULATOR_SM", "89"), 2, "there is room for 3"),
        (&["--act", "f32"], ("EMULATOR_SM", "89"), 2, "--act is for models that run on the processor"),
    ] {
        let done = eval(more, &[settings]);
        assert_eq!(done.code, code, "{settings:?}: {}", done.err);
        assert!(done.err.contains(message), "{settings:?}: {}", done.err);
    }
    // A driver without graphs is slower, and computes the same.
    let done = eval(&[], &[("EMULATOR_GRAPHS", "0")]);
    assert!(done.err.contains("warning: the driver makes no graph of a token's launches"), "{}", done.err);
    assert_eq!(perplexity(done), device);
    let text = |more: &[&str]| {
        let done = awqc(&[&["bench", &out, "-p", "0", "-n", "1", "-r", "1", "--json"], more].concat(), &emulator, &[]);
        assert_eq!(done.code, 0, "{}", done.err);
        done.out
    };
    assert!(text(&[]).contains("a CPU that plays a GPU"));
    let done = awqc(&["bench", &out, "-p", "9", "-n", "3", "-r", "1", "--json"], &emulator, &[]);
    assert_eq!(done.code, 0, "{}", done.err);
    let bench: serde_json::Value = serde_json::from_str(&done.out).expect("JSON");
    assert_eq!(bench["tests"][1]["test"], "tg3", "{bench}");
    // A plan that was tampered with is not carried out.
    let plan = fs::read_to_string(kernels.join("plan.json")).expect("a plan");
    fs::write(kernels.join("plan.json"), plan.replacen("\"kernel\": 0", "\"kernel\": 999", 1)).expect("written");
    let done = eval(&[], &[]);
    assert_eq!(done.code, 4, "{}", done.err);
    assert!(done.err.contains("launches kernel 999"), "{}", done.err);
}
