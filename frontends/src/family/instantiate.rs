//! A family's template and a checkpoint make a module. Whatever does not fit is reported together: missing tensors,
//! surplus ones, and those of another shape.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use awqc_ir::tensor::reads_as;
use awqc_ir::{Dim, Elem, Layout, Module, Op, Region, RegionName, Stored, TensorSource, Type, WeightExpr, WeightId};
use serde_json::{Map, Value as Json};

use super::env::{ConfigEnv, ModelEnv, truth};
use super::nearest::nearest;
use super::{Condition, Family, Pattern, families, harmless};
use crate::error::{ImportError, Problems};
use crate::quantized::{CODES, Held, PARTS, Recoded, Scheme, Unpacked};
use crate::view::View;

/// A model of a family.
pub(crate) struct Instance {
    pub(crate) module: Module,
    /// The checkpoint under the names that the module uses.
    pub(crate) source: Arc<dyn TensorSource>,
    /// Things that a person should know.
    pub(crate) notes: Vec<String>,
}

/// Fills in `family`'s template. `path` is the file that holds the configuration, for messages. `elem` is the type of
/// float weights; if not given, what most of them are stored as.
pub(crate) fn instantiate(
    path: &Path,
    family: &Family,
    config: &Map<String, Json>,
    checkpoint: Arc<dyn TensorSource>,
    scheme: Option<Scheme>,
    elem: Option<Elem>,
) -> Result<Instance, ImportError> {
    for rule in &family.keys {
        rule.check(path, config)?;
    }
    harmless::check(path, family, config)?;
    let env = ConfigEnv { path, config, number: None };
    let mut ignored: Vec<&Pattern> = Vec::new();
    let mut numbered: Vec<(&Pattern, &Condition)> = Vec::new();
    for (pattern, when) in &family.ignore {
        match when {
            // A condition may ask for the number in the name.
            Some(when) if pattern.with(Some("0")) != pattern.0 && when.0.contains("number") => {
                numbered.push((pattern, when));
            }
            Some(when) if !truth(&when.0, &env)? => {}
            Some(_) | None => ignored.push(pattern),
        }
    }
    let mut useless: BTreeSet<String> = BTreeSet::new();
    for name in checkpoint.names().iter().map(|stored| family.name_of(stored)) {
        for (pattern, when) in &numbered {
            let number = pattern.matches(&name).flatten().and_then(|n| n.parse().ok());
            if number.is_some() && truth(&when.0, &ConfigEnv { path, config, number })? {
                useless.insert(name.clone());
            }
        }
    }
    let rename = |stored: &str| {
        let name = family.name_of(stored);
        (!useless.contains(&name) && !ignored.iter().any(|p| p.matches(&name).is_some())).then_some(name)
    };
    let view = View::new(checkpoint, rename)
        .map_err(|e| ImportError::Tensors { path: path.to_owned(), problems: Problems(vec![e]) })?;
    let mut names: BTreeSet<String> = view.names().into_iter().collect();
    let stem = |n: &String| CODES.iter().find_map(|suffix| n.strip_suffix(suffix)).map(|stem| format!("{stem}.weight"));
    let packed: Vec<String> = names.iter().filter_map(stem).collect();
    if let (None, Some(name)) = (&scheme, packed.first()) {
        return Err(ImportError::config(
            path,
            "quantization_config",
            format!("is missing, but the checkpoint has packed weights such as `{name}`"),
        ));
    }
    let empty = empty_biases(&view, family, &env)?;
    names.retain(|n| !empty.contains(n));
    names.extend(packed);
    let elem = elem.unwrap_or_else(|| dominant(&view));
    let mut module = fill(path, family, config, elem, &|name| names.contains(name))?;
    let tables = module.regions.iter().flat_map(tables).collect();
    let mut fit = Fit {
        view: &view,
        scheme,
        used: BTreeSet::new(),
        recoded: BTreeMap::new(),
        hidden: Vec::new(),
        problems: Vec::new(),
        missing: BTreeSet::new(),
        tables,
    };
    for region in &mut module.regions {
        fit.region(region);
    }
    fit.conditional(&family.only, &module, &env, &empty)?;
    fit.surplus(&module);
    if !fit.problems.is_empty() {
        fit.problems.splice(0..0, other(family, config, &view.stored()));
        return Err(ImportError::Tensors { path: path.to_owned(), problems: Problems(fit.problems) });
    }
    let notes = notes(&fit);
    let Fit { recoded, hidden, .. } = fit;
    if recoded.is_empty() {
        return Ok(Instance { module, source: Arc::new(view), notes });
    }
    Ok(Instance { module, source: Arc::new(Unpacked::new(Arc::new(view), recoded, hidden)), notes })
}

/// Fills in the template alone: tensors that need not be there are, where the configuration asks for them.
pub(crate) fn template(
    path: &Path,
    family: &Family,
    config: &Map<String, Json>,
    elem: Elem,
) -> Result<Module, ImportError> {
    for rule in &family.keys {
        rule.check(path, config)?;
    }
    let env = ConfigEnv { path, config, number: None };
    let mut asked: Vec<&Pattern> = Vec::new();
    for (pattern, when) in &family.only {
        if truth(&when.0, &env)? {
            asked.push(pattern);
        }
    }
    fill(path, family, config, elem, &|name| asked.iter().any(|p| p.matches(name).is_some()))
}

/// The module that the template becomes with this configuration and these tensors.
fn fill(
    path: &Path,
    family: &Family,
    config: &Map<String, Json>,
    elem: Elem,
    has: &dyn Fn(&str) -> bool,
) -> Result<Module, ImportError> {
    let model = ModelEnv::new(path, config, elem, has);
    let parsed = awqc_ir::parse_with(&family.template, &model);
    if let Some(error) = model.into_error() {
        return Err(error);
    }
    parsed.map_err(|e| ImportError::text(path, format!("the template arch/{} cannot be filled in: {e}", family.file)))
}

/// What is said first of tensors that would fit another family better, or this one under other names.
fn other(family: &Family, config: &Map<String, Json>, names: &[String]) -> Option<String> {
    let families = families().ok()?;
    let best = nearest(&families, config, names)?;
    let own = nearest([family], config, names).map_or(0.0, |n| n.score);
    let better = best.family != family.name && best.score > own;
    (better || best.renames()).then(|| best.words())
}

/// What a person should know of packed weights.
fn notes(fit: &Fit<'_>) -> Vec<String> {
    let scattered: Vec<&String> = fit.recoded.iter().filter(|(_, w)| w.scattered.is_some()).map(|(s, _)| s).collect();
    let first = scattered.first().map(|first| {
        format!(
            "{} packed weights, such as `{first}`, share scales among columns that are no neighbours (act-order): they are read as float values, not as codes",
            scattered.len()
        )
    });
    first.into_iter().collect()
}

/// Whether a tensor is a bias of zeros of a packed linear: some programs gave every packed linear one.
fn is_empty_bias(view: &View, name: &str) -> bool {
    let packed = |stem: &str| CODES.iter().any(|suffix| view.contains(&format!("{stem}{suffix}")));
    name.strip_suffix(".bias").is_some_and(packed)
        && view.read_f32(name).is_ok_and(|values| values.iter().all(|v| *v == 0.0))
}

/// Such biases where the configuration says that there are none.
fn empty_biases(view: &View, family: &Family, env: &ConfigEnv<'_>) -> Result<BTreeSet<String>, ImportError> {
    let mut out = BTreeSet::new();
    for (pattern, condition) in &family.only {
        if !truth(&condition.0, env)? {
            let names = view.names().into_iter().filter(|n| pattern.matches(n).is_some() && is_empty_bias(view, n));
            out.extend(names);
        }
    }
    Ok(out)
}

fn elem_of(stored: Stored) -> Option<Elem> {
    match stored {
        Stored::F32 | Stored::F64 => Some(Elem::F32),
        Stored::F16 => Some(Elem::F16),
        Stored::Bf16 => Some(Elem::Bf16),
        Stored::U8 | Stored::I8 | Stored::I16 | Stored::I32 | Stored::I64 => None,
    }
}

/// The element type that most numbers of the checkpoint have; f16 if it has no floats.
fn dominant(source: &dyn TensorSource) -> Elem {
    let mut counts: BTreeMap<Elem, u128> = BTreeMap::new();
    for info in source.names().iter().filter_map(|n| source.info(n)) {
        if let Some(elem) = elem_of(info.stored) {
            let n = info.shape.iter().fold(1u128, |n, d| n.saturating_mul(*d as u128));
            let count = counts.entry(elem).or_default();
            *count = count.saturating_add(n);
        }
    }
    counts.into_iter().max_by_key(|(_, n)| *n).map_or(Elem::F16, |(elem, _)| elem)
}

/// Compares what the module wants with what the checkpoint has.
struct Fit<'a> {
    view: &'a View,
    scheme: Option<Scheme>,
    used: BTreeSet<String>,
    /// Packed weights in no layout of the language, by stem.
    recoded: BTreeMap<String, Recoded>,
    /// The tensors that these consist of.
    hidden: Vec<String>,
    missing: BTreeSet<String>,
    /// Tensors that some region looks rows up in: they have one type wherever they are used.
    tables: BTreeSet<String>,
    problems: Vec<String>,
}

impl Fit<'_> {
    fn region(&mut self, region: &mut Region) {
        let roots = region.used_weights();
        let closure = region.weight_closure(&roots);
        for id in closure.iter().copied() {
            // What a stack is made of comes before it.
            if let WeightExpr::Stack(parts) = &region.weight(id).expr {
                let elem = parts.first().map(|p| region.weight(*p).ty.elem);
                if let Some(elem) = elem.filter(|e| e.quant().is_some()) {
                    let weight = region.weight(id).clone();
                    region.set_weight(id, weight.expr, weight.ty.with_elem(elem));
                }
                continue;
            }
            let WeightExpr::Source(relative) = &region.weight(id).expr else { continue };
            let relative = relative.clone();
            let name = region.tensor_name(&relative);
            let ty = region.weight(id).ty.clone();
            if let Some(stem) = self.scheme.as_ref().and_then(|s| s.stem(&name, |n| self.view.contains(n))) {
                self.packed(region, id, stem, &relative, &closure);
                continue;
            }
            self.used.insert(name.clone());
            self.float(region, id, &name, &ty, &closure);
        }
    }

    /// A weight that is stored in packed parts.
    fn packed(&mut self, region: &mut Region, id: WeightId, stem: &str, relative: &str, closure: &[WeightId]) {
        let Some(scheme) = self.scheme.clone() else { return };
        // Weights that a family stores transposed are packed as linears have them.
        let (id, ty) = match transposed(region, id) {
            Some(parent) => (parent, region.weight(parent).ty.clone()),
            None => (id, region.weight(id).ty.clone()),
        };
        let packed = match scheme.packed(stem, &ty, self.view) {
            Ok(packed) => packed,
            Err(problem) => {
                // Its parts are there: they are wrong, not surplus.
                self.used.extend(PARTS.iter().map(|suffix| format!("{stem}{suffix}")));
                self.problems.push(problem);
                return;
            }
        };
        let quantized = packed.ty(&ty);
        self.used.extend(packed.tensors.iter().cloned());
        if !is_linear(region, id) {
            self.problems.push(format!("`{stem}` is packed, but only the weight of a linear can be"));
            return;
        }
        match &quantized {
            Some(ty) => {
                let tensor = relative.strip_suffix(".weight").unwrap_or(relative).into();
                let layout = ty.layout.unwrap_or(Layout::Rows);
                region.set_weight(id, WeightExpr::Packed { tensor, layout }, ty.clone());
            }
            None => {
                region.set_weight(id, WeightExpr::Source(relative.into()), ty);
                retype(region, id, Elem::F32, closure);
            }
        }
        if let Held::Recoded(weight) = packed.held {
            self.hidden.extend(packed.tensors);
            self.recoded.insert(stem.to_owned(), weight);
        }
    }

    fn float(&mut self, region: &mut Region, id: WeightId, name: &str, ty: &Type, closure: &[WeightId]) {
        let Some(info) = self.view.info(name) else {
            if self.missing.insert(name.to_owned()) {
                self.problems.push(format!("`{name}` is missing; {} is needed", plain(ty)));
            }
            return;
        };
        let Some(elem) = elem_of(info.stored) else {
            self.problems.push(format!("`{name}` holds {}; floats are needed", info.stored));
            return;
        };
        if !ty.const_shape().is_some_and(|shape| reads_as(&info.shape, &shape)) {
            self.problems.push(format!(
                "`{name}` has the shape {:?}; by the configuration it must be {}",
                info.shape,
                plain(ty)
            ));
            return;
        }
        if !self.tables.contains(name) {
            retype(region, id, elem, closure);
        }
    }

    /// Checks the tensors that depend on the configuration; those of `empty` may be there in any case.
    fn conditional(
        &mut self,
        rules: &[(Pattern, Condition)],
        module: &Module,
        env: &ConfigEnv<'_>,
        empty: &BTreeSet<String>,
    ) -> Result<(), ImportError> {
        let layers: Vec<String> = module.regions.iter().filter_map(|r| layer_number(&r.name)).collect();
        for (pattern, condition) in rules {
            let says = |b: bool| format!("`{}` is {b} in the configuration", condition.0);
            if truth(&condition.0, env)? {
                let named = pattern.with(Some("0")) != pattern.0;
                let all: Vec<String> = if named {
                    layers.iter().map(|n| pattern.with(Some(n))).collect()
                } else {
                    vec![pattern.0.clone()]
                };
                for name in all {
                    if !self.view.contains(&name) && self.missing.insert(name.clone()) {
                        self.problems.push(format!("`{name}` is missing, but {}", says(true)));
                    }
                }
            } else {
                let mut names = self.view.names().into_iter();
                let found = names.find(|n| pattern.matches(n).is_some() && !empty.contains(n));
                self.problems.extend(found.map(|n| format!("`{n}` is in the checkpoint, but {}", says(false))));
            }
        }
        Ok(())
    }

    fn surplus(&mut self, module: &Module) {
        let layers = module.layers();
        let extra: Vec<String> =
            self.view.names().into_iter().filter(|n| !self.used.contains(n) && !is_empty_bias(self.view, n)).collect();
        let note = format!(
            "is not part of the model (of {layers} layers, by the configuration): remove it, or correct the configuration"
        );
        self.problems.extend(extra.into_iter().map(|n| format!("`{n}` {note}")));
    }
}

/// The transposition of a weight, if that is all that it is used for.
fn transposed(region: &Region, id: WeightId) -> Option<WeightId> {
    let mut parents = region.weight_ids().filter(|w| region.weight(*w).expr.children().contains(&id));
    let parent = parents.next().filter(|p| matches!(region.weight(*p).expr, WeightExpr::Transpose(_)))?;
    let mut operands = region.nodes().flat_map(|(_, n)| n.operands.iter().filter_map(|o| o.weight()));
    (parents.next().is_none() && operands.all(|w| w != id)).then_some(parent)
}

fn layer_number(name: &RegionName) -> Option<String> {
    match name {
        RegionName::Layer(i) => Some(i.to_string()),
        RegionName::Named(_) => None,
    }
}

/// A shape as checkpoints print it.
fn plain(ty: &Type) -> String {
    let dims: Vec<String> = ty.shape.iter().map(Dim::to_string).collect();
    format!("[{}]", dims.join(", "))
}

/// Whether every use of a weight is as the matrix of a linear.
fn is_linear(region: &Region, id: WeightId) -> bool {
    let uses = || region.nodes().flat_map(|(_, n)| n.operands.iter().enumerate().map(move |(i, o)| (n, i, o.weight())));
    let mut parents = region.weight_ids().filter(|w| region.weight(*w).expr.children().contains(&id));
    let stacked = |w: WeightId| matches!(region.weight(w).expr, WeightExpr::Stack(_)) && is_linear(region, w);
    parents.all(stacked)
        && uses().filter(|(_, _, w)| *w == Some(id)).all(|(n, i, _)| i == 1 && matches!(n.op, Op::Linear(_)))
}

/// The tensors that the region looks rows up in. The type of a table is that of the rows, and so of the values that
/// flow through the model.
fn tables(region: &Region) -> Vec<String> {
    let nodes = region.nodes().filter(|(_, n)| matches!(n.op, Op::Embedding(_)));
    let weights = nodes.flat_map(|(_, n)| n.operands.iter().filter_map(|o| o.weight()));
    weights.flat_map(|w| region.sources(w)).map(|relative| region.tensor_name(&relative)).collect()
}

/// Gives a source the element type that it is stored in, so that nothing is rounded, wherever its type is not bound to
/// those of other terms.
fn retype(region: &mut Region, id: WeightId, elem: Elem, closure: &[WeightId]) {
    if region.weight(id).ty.elem == elem {
        return;
    }
    let parents: Vec<WeightId> =
        closure.iter().copied().filter(|w| region.weight(*w).expr.children().contains(&id)).collect();
    let mut chain = vec![id];
    for parent in parents {
        if !matches!(region.weight(parent).expr, WeightExpr::Transpose(_))
            || closure.iter().any(|w| region.weight(*w).expr.children().contains(&parent))
        {
            return;
        }
        chain.push(parent);
    }
    for w in chain {
        let weight = region.weight(w).clone();
        region.set_weight(w, weight.expr, weight.ty.with_elem(elem));
    }
}
