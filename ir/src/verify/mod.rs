//! The verifier: what every module must satisfy before anything is done with it.
//!
//! Each invariant has a number, one function, and one test that breaks it. All violations are collected; each is shown
//! in the printed region under the line that it is about.
//!
//! | code | invariant |
//! |---|---|
//! | V01 | regions have different names that can be printed; layers are numbered consecutively |
//! | V02 | every id that a region mentions exists; weight terms contain no cycle and nest at most 64 deep |
//! | V03 | each region's parameters have the types at the start of the stream (see [`Module`]) |
//! | V04 | every value is defined once, and before it is used |
//! | V05 | a node has as many operands as its op takes, values and weights in their places |
//! | V06 | a node's results have the types that its op infers |
//! | V07 | a region returns something, and all that it returns is defined |
//! | V08 | attributes are finite and read back as they print |
//! | V09 | weight terms fit their children, and have the shape that follows from them |
//! | V10 | weight terms have the element type and layout of their kind |
//! | V11 | data has a shape that can be counted; its numbers, if at hand, are as many and finite |
//! | V12 | symbolic dimensions are declared, constant ones are 1 … 2³¹; only weights are quantized |
//! | V13 | fused ops have different names that can be printed, and call only those defined before them |
//! | V14 | the weights of a fused body are its parameters; parameters that are weights occur nowhere else |
//! | V15 | no op is foreign: rewrites have recognised all of them |
//!
//! After some passes more holds ([`verify_stage`]):
//!
//! | code | stage | invariant |
//! |---|---|---|
//! | V20 | float | no weight is quantized |
//! | V21 | quantized, packed | no factor, offset or clip stands above a quantization |
//! | V22 | packed | every quantized weight that a node uses has a layout |
//!
//! A module whose first region takes anything else than token ids or pixels is a piece of a model: its stream starts as
//! that region's parameters, and its layers may start at any number.

mod fused;
mod nodes;
mod regions;
mod stage;
#[cfg(test)]
mod tests;
mod types;
mod weights;

use std::ops::Deref;
use std::sync::Arc;

use crate::diag::{Diagnostic, Diagnostics, Place, Show};
use crate::module::{FusedDef, Module};
use crate::region::Region;
use crate::text::{Entity, Form, print_mapped};

pub use stage::{Stage, verify_stage};

/// A module that satisfies every invariant: what back ends take.
#[derive(Clone, Copy, Debug)]
pub struct Verified<'m>(&'m Module);

impl<'m> Verified<'m> {
    /// The module.
    pub fn module(self) -> &'m Module {
        self.0
    }
}

impl Deref for Verified<'_> {
    type Target = Module;

    fn deref(&self) -> &Module {
        self.0
    }
}

/// Checks every invariant.
///
/// # Errors
/// All violations, in the order of the module.
pub fn verify(module: &Module) -> Result<Verified<'_>, Diagnostics> {
    let mut found = Diagnostics::default();
    found.0.extend(regions::names(module));
    found.0.extend(fused::names(module));
    found.0.extend(types::declarations(module));
    for (i, def) in module.fused.iter().enumerate() {
        let fused = module.fused.get(..i).unwrap_or_default();
        Checker::new(module, &def.body, fused, Form::Fused).all(&mut found);
    }
    for region in &module.regions {
        Checker::new(module, region, &module.fused, Form::Region).all(&mut found);
    }
    regions::stream(module, &mut found);
    if found.is_empty() { Ok(Verified(module)) } else { Err(found) }
}

/// One region, and what was found wrong with it.
struct Checker<'a> {
    module: &'a Module,
    region: &'a Region,
    /// The fused ops that it may call.
    fused: &'a [FusedDef],
    form: Form,
    found: Vec<(Entity, Diagnostic)>,
}

impl<'a> Checker<'a> {
    fn new(module: &'a Module, region: &'a Region, fused: &'a [FusedDef], form: Form) -> Self {
        Self { module, region, fused, form, found: Vec::new() }
    }

    fn report(&mut self, entity: Entity, code: &'static str, message: impl Into<String>) {
        self.found.push((entity, Diagnostic::new(code, message)));
    }

    fn all(mut self, found: &mut Diagnostics) {
        // The other checks, and printing, follow ids without looking.
        if let Err(mut broken) = nodes::ids(self.region) {
            broken.notes.push(format!("in region {}", self.region.name));
            found.0.push(broken);
            return;
        }
        nodes::definitions(&mut self);
        nodes::operands(&mut self);
        nodes::results(&mut self);
        nodes::attributes(&mut self);
        nodes::known(&mut self);
        weights::shapes(&mut self);
        weights::elements(&mut self);
        weights::data(&mut self);
        types::values(&mut self);
        fused::parameters(&mut self);
        self.finish(found);
    }

    /// Puts what was found in its place in the printed region.
    fn finish(self, found: &mut Diagnostics) {
        if self.found.is_empty() {
            return;
        }
        let printed = print_mapped(self.module, self.region, self.form);
        let text: Arc<str> = printed.text.into();
        let placed = self.found.into_iter().map(|(entity, mut d)| {
            let span = printed.places.get(&entity).or(printed.places.get(&Entity::Header)).copied().unwrap_or_default();
            d.place = Some(Place { text: text.clone(), span, show: Show::All });
            d
        });
        found.0.extend(placed);
    }
}
