//! V01 and V03: the chain of regions.

use std::collections::BTreeSet;

use crate::diag::{Diagnostic, Diagnostics};
use crate::images::pixels;
use crate::module::Module;
use crate::region::{Region, RegionName};
use crate::text::{Entity, Form, LAYERS, is_sigil_name};
use crate::ty::{Dim, Elem, Type};

use super::Checker;
use super::nodes;

/// V01: names differ and can be printed; layers are consecutive.
pub(super) fn names(module: &Module) -> Vec<Diagnostic> {
    let mut out = Vec::new();
    let mut seen = BTreeSet::new();
    let mut before: Option<u32> = None;
    let mut layers_ended = false;
    for region in &module.regions {
        if !seen.insert(&region.name) {
            out.push(Diagnostic::new("V01", format!("there are two regions {}", region.name)));
            continue;
        }
        match (&region.name, before) {
            (RegionName::Named(name), last) => {
                if !is_sigil_name(name) {
                    out.push(Diagnostic::new("V01", format!("{name:?} cannot be the name of a region")));
                }
                layers_ended = last.is_some();
            }
            (RegionName::Layer(i), None) => {
                if *i != 0 && !is_piece(module) {
                    out.push(Diagnostic::new("V01", format!("the first layer is {}, it must be @0", region.name)));
                }
                before = Some(*i);
            }
            (RegionName::Layer(i), Some(last)) => {
                if layers_ended || last.checked_add(1) != Some(*i) {
                    out.push(Diagnostic::new("V01", format!("layer {} does not follow layer @{last}", region.name)));
                }
                before = Some(*i);
            }
        }
    }
    if module.layers() > LAYERS {
        out.push(Diagnostic::new(
            "V01",
            format!("there are {} layers, at most {LAYERS} are possible", module.layers()),
        ));
    }
    out
}

/// Whether the module starts somewhere in the middle of a model.
fn is_piece(module: &Module) -> bool {
    let first = module.regions.first().and_then(|r| Some((r, *r.params().first()?)));
    first.is_some_and(|(r, p)| {
        nodes::ids(r).is_ok() && r.operand_type(p).elem != Elem::I32 && pixels(r.operand_type(p)).is_none()
    })
}

/// V03: the stream of values has what each region takes.
pub(super) fn stream(module: &Module, found: &mut Diagnostics) {
    if module.regions.iter().any(|r| nodes::ids(r).is_err()) {
        return;
    }
    let types = |region: &Region| region.value_params().map(|v| region.value(v).ty.clone()).collect::<Vec<_>>();
    let mut stream: Vec<Type> = match module.regions.first() {
        Some(first) if is_piece(module) => types(first),
        Some(_) | None => {
            let symbol = |name: &str| Dim::Sym(name.into());
            let text = [Type::new(Elem::I32, [symbol("B"), symbol("S")]), Type::new(Elem::I32, [symbol("S")])];
            let images = module.regions.first().and_then(|r| types(r).into_iter().next());
            images.into_iter().filter(|ty| pixels(ty).is_some()).chain(text).collect()
        }
    };
    for region in &module.regions {
        let mut checker = Checker::new(module, region, &module.fused, Form::Region);
        let params = types(region);
        if params.len() > stream.len() {
            let message = format!("{} parameters, but there are {} values at this point", params.len(), stream.len());
            checker.report(Entity::Header, "V03", message);
        }
        for (i, (want, have)) in params.iter().zip(&stream).enumerate() {
            if want != have {
                checker.report(
                    Entity::Header,
                    "V03",
                    format!("parameter {i} is {want}, the regions before it give {have}"),
                );
            }
        }
        checker.finish(found);
        for (i, result) in region.results().iter().enumerate() {
            let ty = region.value(*result).ty.clone();
            match stream.get_mut(i) {
                Some(slot) => *slot = ty,
                None => stream.push(ty),
            }
        }
    }
}
