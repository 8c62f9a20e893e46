//! The pass manager and the registry: order, checks, hooks, and what they say when something is wrong.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use awqc_ir::op::{Op, Relu, Silu};
use awqc_ir::{FusedDef, Group, Module, Operand, Quant, Region, ValueId, WeightId, text};
use awqc_passes::instrument::{Event, PrintAfter, PrintChange, PrintDir, Reproducer, Selection};
use awqc_passes::manager::{Manager, ManagerError, ManagerErrorKind, Options, shared_tensors};
use awqc_passes::pass::Budget;
use awqc_passes::rewrite::parse_rules;
use awqc_passes::{
    Afterwards, Changed, ExecError, Executor, Fidelity, InputStats, Pass, PassCx, PassError, Registry, Remarks, Scheme,
    Tensor,
};
use serde::{Deserialize, Serialize};

/// Each result is one number: how many nodes the region has, and a little more for each `silu`.
struct Counting;

impl Executor for Counting {
    fn realize(&self, _: &Region, _: WeightId) -> Result<Tensor, ExecError> {
        Err(ExecError::Unavailable("no weights".into()))
    }

    fn profile(
        &mut self,
        _: &Region,
        _: &[FusedDef],
        _: &[ValueId],
        _: Afterwards,
    ) -> Result<Vec<InputStats>, ExecError> {
        Err(ExecError::Unavailable("no stream".into()))
    }

    fn evaluate(&self, region: &Region, _: &[FusedDef], at: &[ValueId]) -> Result<Vec<Tensor>, ExecError> {
        let silu = region.nodes().filter(|(_, n)| matches!(n.op, Op::Silu(_))).count();
        let number = 100.0 + silu as f32;
        Ok(at.iter().map(|_| Tensor::new(vec![1], vec![number])).collect())
    }
}

/// Appends a `silu` to every region: it changes the function by a hundredth, whatever it claims.
macro_rules! append_silu {
    ($ty:ident, $name:literal, $fidelity:expr) => {
        struct $ty;

        impl Pass for $ty {
            const NAME: &'static str = $name;
            const DOC: &'static str = "Appends a `silu`.";
            type Options = ();

            fn fidelity() -> Fidelity {
                $fidelity
            }

            fn new((): ()) -> Result<Self, PassError> {
                Ok(Self)
            }

            fn run(&self, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
                let result = region.results()[0];
                let node = region.append(Op::Silu(Silu {}), vec![Operand::Value(result)], &["s"], cx.fused);
                let value = region.node(node.map_err(|e| PassError::Refused(e.to_string()))?).results[0];
                region.set_results(vec![value]);
                Ok(Changed::Yes)
            }
        }
    };
}

append_silu!(Liar, "liar", Fidelity::Exact);
append_silu!(Rough, "rough", Fidelity::Rounding(1e6));
append_silu!(Honest, "honest", Fidelity::Lossy);

/// Leaves a use of a removed node behind.
struct Broken;

impl Pass for Broken {
    const NAME: &'static str = "broken";
    const DOC: &'static str = "";
    type Options = ();

    fn fidelity() -> Fidelity {
        Fidelity::Exact
    }

    fn new((): ()) -> Result<Self, PassError> {
        Ok(Self)
    }

    fn run(&self, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
        let x = region.value_params().next().map(Operand::Value);
        let node = region.append(Op::Relu(Relu {}), x.into_iter().collect(), &["r"], cx.fused);
        let node = node.map_err(|e| PassError::Refused(e.to_string()))?;
        // A relu of two operands is none.
        let bad = region.node(node).results[0];
        region.set_results(vec![bad, bad]);
        let other = awqc_ir::Type::new(awqc_ir::Elem::F32, [3.into()]);
        let stray = region.add_param("stray", other);
        region.set_operand(node, 0, Operand::Value(stray));
        Ok(Changed::Yes)
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
struct RoundOptions {
    bits: u8,
    sides: Vec<String>,
}

impl Default for RoundOptions {
    fn default() -> Self {
        Self { bits: 4, sides: Vec::new() }
    }
}

/// Has options and a scheme, and changes nothing.
struct Round(RoundOptions);

impl Pass for Round {
    const NAME: &'static str = "round";
    const DOC: &'static str = "";
    type Options = RoundOptions;

    fn fidelity() -> Fidelity {
        Fidelity::Exact
    }

    fn new(options: RoundOptions) -> Result<Self, PassError> {
        match options.bits {
            2..=8 => Ok(Self(options)),
            bits => Err(PassError::Refused(format!("{bits} bits are too many or too few"))),
        }
    }

    fn scheme(&self) -> Option<Scheme> {
        Some(Scheme::Uniform(Quant { bits: self.0.bits, symmetric: false, group: Group::Row }))
    }

    fn run(&self, _: &mut Region, _: &mut PassCx<'_>) -> Result<Changed, PassError> {
        Ok(Changed::No)
    }
}

/// Notes the scheme and whether the region is the last.
struct Peek;

impl Pass for Peek {
    const NAME: &'static str = "peek";
    const DOC: &'static str = "";
    type Options = ();

    fn fidelity() -> Fidelity {
        Fidelity::Exact
    }

    fn new((): ()) -> Result<Self, PassError> {
        Ok(Self)
    }

    fn run(&self, _: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
        let bits = match cx.scheme {
            Some(Scheme::Uniform(quant)) => quant.bits.to_string(),
            Some(Scheme::Mixed { .. }) => "mixed".to_owned(),
            None => "none".to_owned(),
        };
        let message = format!("{bits} {} {:?}", cx.last, cx.shared);
        cx.remarks.push(awqc_passes::RemarkKind::Applied, message);
        Ok(Changed::No)
    }
}

fn registry() -> Registry {
    Registry::empty().with::<Liar>().with::<Rough>().with::<Honest>().with::<Broken>().with::<Round>().with::<Peek>()
}

fn module() -> Module {
    let text = "awqir 1\nmodel \"test\" {dtype=f32}\ndim B, S\n\
        region @a (%x: f32[B,S,8]) { $w = \"w\" : f32[8,8]\n %y = linear %x, $w\n return %y }\n\
        region @b (%x: f32[B,S,8]) { $w = \"w\" : f32[8,8]\n $v = \"v\" : f32[8,8]\n %z = linear %x, $w\n %y = linear %z, $v\n return %y }\n";
    text::parse(text).unwrap_or_else(|e| panic!("{e}"))
}

fn run(manager: &mut Manager, module: &mut Module, remarks: &mut Remarks) -> (Result<(), ManagerError>, Vec<Event>) {
    let events = RefCell::new(Vec::new());
    let done = manager.run_module(module, &mut Counting, remarks, &mut |e| events.borrow_mut().push(e));
    (done.map(|_| ()), events.into_inner())
}

fn manager(pipeline: &str, options: Options) -> Manager {
    Manager::new(&registry(), pipeline.parse().unwrap(), options).unwrap_or_else(|e| panic!("{e}"))
}

fn checked() -> Options {
    Options { check_each: true, ..Options::default() }
}

#[test]
fn a_pass_that_breaks_its_promise_is_named() {
    let (done, _) = run(&mut manager("peek,liar", checked()), &mut module(), &mut Remarks::default());
    let error = done.unwrap_err();
    assert_eq!((error.pass.as_str(), error.region.to_string()), ("liar", "@a".to_owned()));
    let text = error.to_string();
    assert!(text.starts_with("liar on @a: result 0 changed by 1.000e-2 of its largest magnitude"), "{text}");
    assert!(matches!(error.kind, ManagerErrorKind::Check { result: 0, .. }));
    // Not checked: not seen.
    assert!(run(&mut manager("liar", Options::default()), &mut module(), &mut Remarks::default()).0.is_ok());
    // Within its fidelity.
    assert!(run(&mut manager("rough", checked()), &mut module(), &mut Remarks::default()).0.is_ok());
}

#[test]
fn a_lossy_pass_reports_its_deviation() {
    let mut remarks = Remarks::default();
    assert!(run(&mut manager("honest", checked()), &mut module(), &mut remarks).0.is_ok());
    let key = ("honest".to_owned(), "largest relative deviation".to_owned());
    assert!((remarks.stats[&key] - 0.01).abs() < 1e-6);
}

#[test]
fn an_invalid_region_is_a_bug_of_the_pass() {
    let (done, _) = run(&mut manager("broken", Options::default()), &mut module(), &mut Remarks::default());
    let error = done.unwrap_err();
    assert!(matches!(error.kind, ManagerErrorKind::Verify(_)), "{error}");
    assert!(error.to_string().contains("broken on @a: the pass left an invalid region behind"));
    let unchecked = Options { verify_each: false, ..Options::default() };
    assert!(run(&mut manager("broken", unchecked), &mut module(), &mut Remarks::default()).0.is_ok());
}

#[test]
fn passes_see_the_scheme_behind_them_and_their_place() {
    let mut remarks = Remarks::default();
    assert!(run(&mut manager("peek,round{bits=3},peek", Options::default()), &mut module(), &mut remarks).0.is_ok());
    let seen: Vec<&str> = remarks.list.iter().map(|r| r.message.as_str()).collect();
    assert_eq!(seen, ["3 false {\"w\"}", "none false {\"w\"}", "3 true {\"w\"}", "none true {\"w\"}"]);
    let at: Vec<String> = remarks.list.iter().map(|r| format!("{} {}", r.pass, r.region)).collect();
    assert_eq!(at, ["peek @a", "peek @a", "peek @b", "peek @b"]);
    assert_eq!(shared_tensors(&module().regions), BTreeSet::from(["w".to_owned()]));
}

#[test]
fn a_stop_is_heard_between_passes() {
    let options = Options { stop: Arc::new(AtomicBool::new(true)), ..Options::default() };
    let (done, _) = run(&mut manager("liar", options), &mut module(), &mut Remarks::default());
    assert!(matches!(done.unwrap_err().kind, ManagerErrorKind::Interrupted));
}

#[test]
fn hooks_see_every_step() {
    let mut manager = manager("peek,liar", Options::default())
        .with_hook(PrintChange::default())
        .with_hook(PrintAfter(Selection::new("peek")))
        .with_hook(PrintDir);
    let (done, events) = run(&mut manager, &mut module(), &mut Remarks::default());
    assert!(done.is_ok());
    let titles: Vec<String> = events
        .iter()
        .map(|e| match e {
            Event::Print { title, .. } => title.clone(),
            Event::File { path, .. } => path.clone(),
            Event::Reproducer { .. } => "reproducer".into(),
        })
        .collect();
    let of = |r: &str| {
        let files = [format!("00-input/{r}.awqir"), format!("{r} after peek"), format!("01-peek/{r}.awqir")];
        files.into_iter().chain([format!("{r} after liar"), format!("02-liar/{r}.awqir")])
    };
    assert_eq!(titles, of("@a").chain(of("@b")).collect::<Vec<_>>());
    let Event::Print { text, .. } = &events[3] else { panic!("a diff") };
    assert!(text.contains("\n+  %s = silu %y"), "{text}");
    // What is written can be read.
    for event in &events {
        if let Event::File { text, .. } = event {
            assert!(text::parse(text).is_ok(), "{text}");
        }
    }
    let names: Vec<&str> = manager.times().map(|(name, _)| name).collect();
    assert_eq!(names, ["peek", "liar"]);
}

#[test]
fn a_failure_leaves_a_reproducer() {
    let mut manager = manager("peek,liar,round{bits=3}", checked()).with_hook(Reproducer);
    let (done, events) = run(&mut manager, &mut module(), &mut Remarks::default());
    assert!(done.is_err());
    let [Event::Reproducer { text }] = events.as_slice() else { panic!("{events:?}") };
    assert!(text.starts_with("// passes: liar,round{bits=3}\nawqir 1\n"), "{text}");
    assert!(!text.contains("silu"), "the region as it was before the pass: {text}");
    assert!(text::parse(text).is_ok());
}

#[test]
fn unknown_names_are_pointed_at() {
    let error = |p: &str| registry().resolve(&p.parse().unwrap()).err().unwrap().to_string();
    let got = error("peek,runod{bits=3}");
    assert!(got.starts_with("there is no pass `runod`\n  peek,runod{bits=3}\n       ^^^^^\n"), "{got}");
    assert!(got.contains("did you mean `round`?"), "{got}");
    let got = error("round{sides=[],bit=3}");
    let want = "`round` has no option `bit`\n  round{sides=[],bit=3}\n                 ^^^^^\nhelp: did you mean `bits`? The options are: bits, sides";
    assert_eq!(got, want);
    assert!(error("peek{a}").contains("there are no options"));
    let got = error("round{sides=[a],bits=many}");
    assert!(got.contains("^^^^^^^^^") && got.contains("the default is bits=4"), "{got}");
    assert!(error("round{bits=9}").contains("9 bits are too many"));
}

#[test]
fn the_registry_tells_what_there_is() {
    let registry = registry();
    let info = registry.get("round").unwrap();
    assert_eq!(serde_json::to_string(&info.options).unwrap(), r#"{"bits":4,"sides":[]}"#);
    assert!(registry.get("peek").unwrap().options.is_empty());
    assert_eq!(registry.passes().len(), 6);
    assert_eq!(registry.clone().with::<Peek>().passes().len(), 6, "the last of a name replaces the others");
}

#[test]
fn rules_of_a_file_are_a_pass() {
    let rules = parse_rules(
        "rewrite \"twice\" { match { %a = silu %x\n %b = silu %a } produce { %b = fused @silu_twice(%x) } }",
    );
    let registry = registry().with_rewrites("mine", rules.unwrap());
    assert_eq!(registry.get("mine").unwrap().fidelity, Fidelity::Exact);
    for (budget, calls) in [(Budget::default(), 2), (Budget::of(1), 1)] {
        let options = Options { budget, ..Options::default() };
        let mut manager = Manager::new(&registry, "liar,liar,mine".parse().unwrap(), options).unwrap();
        let mut module = module();
        assert!(run(&mut manager, &mut module, &mut Remarks::default()).0.is_ok());
        assert_eq!(
            text::print(&module).matches("= fused @silu_twice").count(),
            calls,
            "the budget is that of the module"
        );
    }
}
