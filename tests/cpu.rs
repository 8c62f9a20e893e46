//! The packed back end computes what the reference executor computes: float models of every family, and compiled ones.

use awqc::cpu::{Activations, CacheNumbers, CpuError, Isa, Options, Pages, Session};
use awqc::exec::Logits;
use awqc::generate::session;
use awqc::ir::verify::verify;
use awqc::ir::{Module, Op};
use awqc::model::Model;

use crate::cli::{awqc, path, scratch};
use crate::models::{Expected, folders, largest_difference, name, reference, seen};

fn options(threads: usize) -> Options {
    Options {
        context: 64,
        threads,
        isa: Isa::detect(),
        activations: Activations::F32,
        pages: Pages::Map,
        cache: CacheNumbers::F32,
    }
}

/// The norm of the difference over the norm.
fn relative_error(found: &[f32], exact: &[f32]) -> f64 {
    let squares: f64 = found.iter().zip(exact).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    (squares / exact.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>()).sqrt()
}

/// The first op of a module that this back end refuses: those of text that attends to images.
fn without_kernel(module: &Module) -> Option<&'static str> {
    let mut ops = module.regions.iter().flat_map(|r| r.nodes()).map(|(_, n)| &n.op);
    ops.find(|op| matches!(op, Op::Count(_) | Op::CrossSdpa(_))).map(Op::mnemonic)
}

#[test]
fn every_family_computes_the_same() {
    for folder in folders() {
        let (name, expected) = (name(&folder), Expected::read(&folder));
        let model = Model::open(&folder).unwrap_or_else(|e| panic!("{name}: {e}"));
        let module = verify(&model.module).unwrap_or_else(|e| panic!("{name}: {e}"));
        if let Some(op) = without_kernel(&model.module) {
            let refused = Session::new(module, model.source.as_ref(), options(1)).map(|_| ()).expect_err(&name);
            assert!(matches!(&refused, CpuError::Unsupported(why) if why.contains(op)), "{name}: {refused}");
            continue;
        }
        let (ids, text) = (expected.ids().remove(0), expected.text().remove(0));
        let rows = seen(&model, &expected);
        let want = reference(&model, &expected).forward(&ids, Logits::All).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut first = None;
        for threads in [1, 3] {
            let mut cpu =
                Session::new(module, model.source.as_ref(), options(threads)).unwrap_or_else(|e| panic!("{name}: {e}"));
            let begin = |cpu: &mut Session<'_>| match rows.clone() {
                Some(rows) => cpu.see(rows).unwrap_or_else(|e| panic!("{name}: {e}")),
                None => cpu.reset(),
            };
            begin(&mut cpu);
            let got = cpu.forward(&ids, Logits::All).unwrap_or_else(|e| panic!("{name}: {e}"));
            let worst = largest_difference(&got.data, &want.data);
            assert!(worst <= 1e-4, "{name}: logits differ by {worst} with {threads} threads");
            assert_eq!(
                *first.get_or_insert_with(|| got.data.clone()),
                got.data,
                "{name}: the threads change the result"
            );

            // Step by step, against the reference step by step: some frequencies depend on the length.
            let mut reference = reference(&model, &expected);
            begin(&mut cpu);
            // All places of an image are in one piece.
            let pieces = ids.chunks(if rows.is_some() { ids.len() } else { ids.len() / 2 });
            for (i, part) in pieces.chain([&text[..1], &text[1..2]]).enumerate() {
                let got = cpu.forward(part, Logits::Last).unwrap_or_else(|e| panic!("{name}: {e}"));
                let want = reference.forward(part, Logits::Last).unwrap_or_else(|e| panic!("{name}: {e}"));
                let worst = largest_difference(&got.data, &want.data);
                assert!(worst <= 1e-4, "{name}: part {i} differs by {worst}");
            }
        }
    }
}

#[test]
fn too_long_a_sequence_and_unknown_tokens_are_refused_beforehand() {
    let folder = folders().remove(0);
    let model = Model::open(&folder).expect("a model");
    let module = verify(&model.module).expect("a valid module");
    let mut cpu = Session::new(module, model.source.as_ref(), options(2)).expect("a session");
    let error = cpu.forward(&[1; 65], Logits::Last).expect_err("too long").to_string();
    assert!(error.contains("65 positions") && error.contains("room for 64"), "{error}");
    let error = cpu.forward(&[1, i32::MAX], Logits::Last).expect_err("unknown token").to_string();
    assert!(error.contains("embedding table"), "{error}");
    assert_eq!(cpu.position(), 0);
    cpu.forward(&[1; 64], Logits::Last).expect("just fits");
}

/// What a model predicts for `ids`, the last `alone` of them one by one.
fn logits_of(model: &Model, ids: &[i32], alone: usize, options: Options) -> Vec<f32> {
    let module = verify(&model.module).expect("a valid module");
    let mut cpu = Session::new(module, model.source.as_ref(), options).expect("a session");
    let (first, rest) = ids.split_at(ids.len() - alone);
    let mut all = cpu.forward(first, Logits::All).expect("logits").data;
    for id in rest {
        all.extend(cpu.forward(&[*id], Logits::All).expect("logits").data);
    }
    all
}

/// Attention takes keys in pieces, some of which a window hides.
#[test]
fn sequences_of_several_pieces_compute_the_same() {
    let ids: Vec<i32> = (0..300).map(|i| i * 7 % 97).collect();
    for name in ["llama", "mistral", "gemma2", "falcon-alibi"] {
        let folder = folders().into_iter().find(|f| f.ends_with(name)).expect("a golden");
        let model = Model::open(&folder).expect("a model");
        let mut reference = session(&model).expect("a session");
        let want = reference.forward(&ids, Logits::All).expect("logits").data;
        for (cache, allowed) in [(CacheNumbers::F32, 0.0..1e-5), (CacheNumbers::F16, 1e-6..5e-3)] {
            for (threads, alone) in [(1, 0), (2, 0), (1, 180), (3, 180)] {
                let options = Options { context: 300, cache, ..options(threads) };
                let error = relative_error(&logits_of(&model, &ids, alone, options), &want);
                assert!(allowed.contains(&error), "{name}, {cache:?}, {threads} threads, {alone} alone: {error}");
            }
        }
    }
}

/// With packed weights a token gets the same bits alone or among others, with any threads and instruction set.
#[test]
fn pieces_are_joined_alike_in_a_prompt_and_behind_it() {
    let ids: Vec<i32> = (0..300).map(|i| i * 7 % 97).collect();
    for name in ["llama", "gemma2"] {
        let folder = folders().into_iter().find(|f| f.ends_with(name)).expect("a golden");
        let dir = scratch();
        let (from, out) = (folder.display().to_string(), path(&dir, "out"));
        let made =
            awqc(&["compile", &from, "--method", "rtn", "--target", "cpu-native", "--group", "16", "-o", &out, "-q"]);
        assert_eq!(made.code, 0, "{}", made.err);
        let model = Model::open(out.as_ref()).expect("what was compiled");
        for cache in CacheNumbers::ALL {
            let logits = |threads, alone, isa| {
                let options = Options { context: 300, cache, isa, activations: Activations::Int8, ..options(threads) };
                logits_of(&model, &ids, alone, options)
            };
            let want = logits(1, 0, Isa::detect());
            for (threads, alone) in [(3, 0), (1, 180), (2, 180), (3, 40)] {
                assert!(logits(threads, alone, Isa::detect()) == want, "{name}, {cache:?}: {threads}, {alone} alone");
            }
            for isa in Isa::available() {
                assert!(logits(2, 20, isa) == want, "{name}, {cache:?}, {isa}");
            }
        }
    }
}

/// A long prompt ends between two pieces of it; one piece is not interrupted.
#[test]
fn an_interrupt_ends_a_long_prompt() {
    let folder = folders().into_iter().find(|f| f.ends_with("llama")).expect("a golden");
    let model = Model::open(&folder).expect("a model");
    let module = verify(&model.module).expect("a valid module");
    let flag = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let options = Options { context: 400, ..options(2) };
    let cpu = Session::new(module, model.source.as_ref(), options).expect("a session");
    let mut cpu = cpu.with_interrupt(flag.clone());
    cpu.forward(&[1; 400], Logits::Last).expect("nobody interrupts");
    cpu.reset();
    flag.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(matches!(cpu.forward(&[1; 400], Logits::Last), Err(CpuError::Interrupted)));
    assert!((1..400).contains(&cpu.position()), "{} tokens", cpu.position());
    cpu.reset();
    cpu.forward(&[1; 20], Logits::Last).expect("one piece");
}

/// What would measure or run something else than was asked for is refused, and sums that overflow are none.
#[test]
fn what_cannot_be_measured_is_refused() {
    let folder = folders().into_iter().find(|f| f.ends_with("llama")).expect("a golden").display().to_string();
    let dir = scratch();
    let [cpu, cuda] = ["cpu-native", "cuda-sm89"].map(|target| {
        let out = path(&dir, target);
        let made =
            awqc(&["compile", &folder, "--method", "rtn", "--group", "16", "--target", target, "-o", &out, "-q"]);
        assert_eq!(made.code, 0, "{}", made.err);
        out
    });
    let most = usize::MAX.to_string();
    for (args, code, message) in [
        (["bench", &cpu, "--device", "cuda", "-n", "1"], 2, "the model has no kernels for a device"),
        (["bench", &cuda, "--device", "host", "-n", "1"], 2, "that is no speed to measure"),
        (["bench", &cpu, "-d", &most, "-n", "4"], 6, "there is no memory"),
    ] {
        let done = awqc(&args);
        assert_eq!((done.code, done.err.contains(message)), (code, true), "{args:?}: {}", done.err);
    }
    let done = awqc(&["bench", &cpu, "-p", "4", "-n", "1", "-r", "1", "--threads", "100000", "--json"]);
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(done.err.contains("--threads 100000: the machine runs"), "{}", done.err);
}

/// A token reads all of a model's matrices but the embedding's, and of experts those that it goes to.
#[test]
fn a_token_reads_the_experts_that_it_goes_to() {
    let folder = folders().into_iter().find(|f| f.ends_with("mixtral")).expect("a golden");
    let model = Model::open(&folder).expect("a model");
    let cpu = Session::new(verify(&model.module).expect("a valid module"), model.source.as_ref(), options(1));
    // In each layer q 48, k and v 16 of 32 channels, o 32 of 48, the router 4 of 32; and the head, 160 of 32.
    let shared = 2 * (48 * 32 + 2 * 16 * 32 + 32 * 48 + 4 * 32) + 160 * 32;
    // In each layer two of four experts, three matrices of 32 by 32.
    let chosen = 2 * 2 * 3 * 32 * 32;
    // A checkpoint's numbers are held as f32.
    assert_eq!(cpu.expect("a session").bytes_per_token(), 4 * (shared + chosen));
}

/// Long enough a prompt is multiplied in bf16 where there is AMX; a short one as anywhere else, and nowhere else any.
#[test]
fn prompts_in_bf16_predict_what_exact_ones_do() {
    let folder = folders().into_iter().find(|f| f.ends_with("llama")).expect("a golden");
    let dir = scratch();
    let out = path(&dir, "out");
    let made = awqc(&["compile", &folder.display().to_string(), "--method", "rtn", "--group", "16", "-o", &out, "-q"]);
    assert_eq!(made.code, 0, "{}", made.err);
    let model = Model::open(out.as_ref()).expect("what was compiled");
    let module = verify(&model.module).expect("a valid module");
    let with =
        |activations, isa| Session::new(module, model.source.as_ref(), Options { activations, isa, ..options(2) });
    let refused = with(Activations::Bf16, Isa::Scalar).map(|_| ()).expect_err("no tiles").to_string();
    assert!(refused.contains("amx"), "{refused}");
    if !Isa::Amx.is_available() {
        println!("skipped: no amx");
        return;
    }
    let logits = |activations, ids: &[i32]| {
        with(activations, Isa::Amx).and_then(|mut s| s.forward(ids, Logits::All)).expect("logits").data
    };
    let ids: Vec<i32> = (0..60).map(|i| i * 7 % 97).collect();
    let exact = logits(Activations::F32, &ids);
    let [bf16, int8] = [Activations::Bf16, Activations::Int8].map(|form| relative_error(&logits(form, &ids), &exact));
    assert!(0.0 < bf16 && bf16 < int8 && int8 < 0.1, "relative errors {bf16} and {int8}");
    assert_eq!(logits(Activations::Bf16, &ids[..15]), logits(Activations::Int8, &ids[..15]));
}
