//! The gradient against differences of the divergence itself, and what tuning does to a model.

use awqc_ir::verify::verify;

use super::{Options, Student, settle, tune};
use crate::control::Control;
use crate::gradient::example::{models, random, windows};
use crate::stream;

#[test]
fn the_gradient_is_that_of_the_divergence() {
    let (float, source, mut small) = models();
    small.regions.iter_mut().for_each(|r| settle(r, &source).unwrap());
    let windows = windows(2);
    let control = Control::new();
    let teacher = stream::prepare(verify(&float).unwrap(), &source, &windows, &control).unwrap();
    let mut student = Student::new(&small, &source).unwrap();
    let loss = student.step(&teacher, &windows, &[0, 1], 0.0, &control).unwrap();
    let measured = student.divergence(&teacher, &windows, &[0, 1], &control).unwrap();
    assert!(loss > 0.01 && (loss - measured).abs() < 1e-5, "{loss} {measured}");
    let mut number = random(23);
    let mut checked = 0;
    for region in 0..student.moved.len() {
        for weight in 0..student.moved[region].len() {
            let moved = &student.moved[region][weight];
            let at = ((number() + 1.0) * 0.5 * moved.len() as f32) as usize % moved.len();
            let want = f64::from(moved.first_gradient(at));
            let mut at_change = |change: f32| {
                student.moved[region][weight].set(at, change);
                student.divergence(&teacher, &windows, &[0, 1], &control).unwrap()
            };
            let step = 0.02f32;
            let (up, down) = (at_change(step), at_change(-step));
            at_change(0.0);
            let got = (up - down) / f64::from(2.0 * step);
            assert!((got - want).abs() < 2e-4 + 0.03 * want.abs(), "region {region}, weight {weight}: {got} {want}");
            checked += usize::from(want.abs() > 1e-3);
        }
    }
    // Two layers of a norm each side, four or five linears; the last norm.
    assert!(checked >= 8, "only {checked} gradients are large enough to tell");
}

#[test]
fn tuning_lowers_the_divergence_on_windows_that_it_did_not_see() {
    let (float, source, small) = models();
    let windows = windows(24);
    let control = Control::new();
    let options = Options { steps: 60, batch: 4, rate: 0.01, held_out: 4 };
    let mut tuned = small.clone();
    let float = verify(&float).unwrap();
    let mut reported = Vec::new();
    let mut report = |step, loss| reported.push((step, loss));
    let result = tune(&mut tuned, float, &source, &windows, &options, &control, &mut report).unwrap();
    assert!(result.kept && result.after < 0.8 * result.before, "{} {}", result.before, result.after);
    assert_eq!((result.steps.len(), reported.len(), reported[59].0), (60, 60, 60));
    // The module holds what was measured, but for the rounding of scales to f16.
    verify(&tuned).unwrap();
    let teacher = stream::prepare(float, &source, &windows, &control).unwrap();
    let student = Student::new(&tuned, &source).unwrap();
    let again = student.divergence(&teacher, &windows, &[20, 21, 22, 23], &control).unwrap();
    assert!((again - result.after).abs() < 0.01 * result.after, "{again} {}", result.after);
}

#[test]
fn a_batch_holds_no_window_twice() {
    let (float, source, small) = models();
    let windows = windows(5);
    let losses = |batch| {
        let options = Options { steps: 2, batch, rate: 0.01, held_out: 2 };
        let float = verify(&float).unwrap();
        tune(&mut small.clone(), float, &source, &windows, &options, &Control::new(), &mut |_, _| {}).unwrap().steps
    };
    assert_eq!(losses(3), losses(100));
    assert_ne!(losses(3), losses(2));
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let (float, source, small) = models();
    let windows = windows(8);
    let options = Options { steps: 3, batch: 3, rate: 0.01, held_out: 2 };
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut module = small.clone();
        let float = verify(&float).unwrap();
        pool.install(|| {
            tune(&mut module, float, &source, &windows, &options, &Control::new(), &mut |_, _| {}).unwrap().steps
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn too_few_windows_are_refused_and_nothing_is_moved() {
    let (float, source, small) = models();
    let mut module = small.clone();
    let options = Options { steps: 3, batch: 1, rate: 0.01, held_out: 4 };
    let float = verify(&float).unwrap();
    let error = tune(&mut module, float, &source, &windows(4), &options, &Control::new(), &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("more than 4"), "{error}");
    assert_eq!(awqc_ir::text::print(&module), awqc_ir::text::print(&small));
}
