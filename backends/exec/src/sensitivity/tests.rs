//! The squares of gradients against differences of the loss itself.

use awqc_ir::{Module, verify::verify};

use super::*;
use crate::gradient::example::{models, random, windows};
use crate::memory::MemorySource;

/// What is added to a linear's output: region, linear, position, channel, how much.
type Nudge = (usize, usize, usize, usize, f32);

/// The sum of the negative log-likelihoods of a window's tokens.
fn loss(module: &Module, source: &MemorySource, ids: &[i32], nudge: Option<Nudge>) -> f64 {
    let mut stream = stream::open::<Host>(&[ids.to_vec()], &Default::default()).unwrap().remove(0);
    let interpreter = Interpreter::<Host> { fused: &module.fused, device: &Default::default() };
    for (at, region) in module.regions.iter().enumerate() {
        let probed = Probed::of(region, &module.fused).unwrap();
        let (mut inputs, rest) = chain::enter(stream, region).unwrap();
        for (i, mut zeros) in probed.zeros(&inputs).unwrap().into_iter().enumerate() {
            if let Some((_, _, position, channel, by)) = nudge.filter(|n| (n.0, n.1) == (at, i)) {
                let cols = zeros.cols();
                zeros.data[position * cols + channel] = by;
            }
            inputs.push(Val::floats(zeros, &Default::default()));
        }
        let weights = Weights::load(&probed.region, source, &Default::default()).unwrap();
        stream = interpreter.run(&probed.region, &weights, inputs, None, &mut |_, _| Ok(())).unwrap();
        stream.extend(rest);
    }
    let logits = stream[0].to_tensor().unwrap();
    let rows = logits.data.chunks(logits.cols()).zip(&ids[1..]);
    rows.map(|(row, id)| log_sum_exp(row) - f64::from(row[*id as usize])).sum()
}

#[test]
fn sensitivities_are_squares_of_the_derivatives_by_the_outputs() {
    let (module, source, _) = models();
    let windows = windows(2);
    let tokens = windows.iter().map(Vec::len).sum::<usize>() as f64;
    let (control, mut told) = (Control::new(), Vec::new());
    let mut report = |done, total| told.push((done, total));
    let found = sensitivity(verify(&module).unwrap(), &source, &windows, &control, &mut report).unwrap();
    assert_eq!(told, [(1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6)]);
    assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [0, 5, 5, 0]);
    let mut number = random(3);
    let mut checked = 0;
    for (at, linears) in found.iter().enumerate() {
        for (i, (_, minds)) in linears.iter().enumerate() {
            let channel = ((number() + 1.0) * 0.5 * minds.len() as f32) as usize % minds.len();
            let mut want = 0.0;
            for ids in &windows {
                for position in 0..ids.len() {
                    let at_shift = |by| loss(&module, &source, ids, Some((at, i, position, channel, by)));
                    want += ((at_shift(0.01) - at_shift(-0.01)) / 0.02).powi(2);
                }
            }
            let got = minds[channel] * tokens;
            assert!((got - want).abs() < 2e-4 + 0.03 * want, "region {at}, linear {i}: {got}, by differences {want}");
            checked += usize::from(want > 1e-2);
        }
    }
    assert!(checked >= 6, "only {checked} are large enough to tell");
    // Nothing is added: the probed region is the region.
    assert_eq!(loss(&module, &source, &windows[0], None), loss(&module, &source, &windows[0], Some((1, 0, 0, 0, 0.0))));
}

#[test]
fn they_do_not_depend_on_the_number_of_threads() {
    let (module, source, _) = models();
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let module = verify(&module).unwrap();
        pool.install(|| sensitivity(module, &source, &windows(5), &Control::new(), &mut |_, _| {}).unwrap())
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn windows_without_a_next_token_are_refused() {
    let (module, source, _) = models();
    let module = verify(&module).unwrap();
    let error = sensitivity(module, &source, &[vec![1]], &Control::new(), &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("two tokens"), "{error}");
}
