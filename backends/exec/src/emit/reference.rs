//! The artefact that awqc itself runs: a folder that this crate's interpreter runs, and that needs nothing else. Packed
//! weights are stored in the layout that the pass `pack` chose, or else row by row.
//!
//! `weights.safetensors` holds every weight as it comes out of its expression, `checksums.json` the
//! CRC-32 of each; `module.awqir` is the module with every expression replaced by that tensor; `provenance.awqir` is
//! the module as compiled, expressions and all.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use awqc_ir::{
    Elem, FusedDef, Layout, Module, Operand, Region, RegionName, Type, Verified, WeightExpr, WeightId, print, verify,
};
use awqc_passes::rtn::Codes;

use super::{EmitCx, EmitError, Emitted, Emitter, ExtraFile, Writer, encode, write, write_extra};
use crate::layout;
use crate::realize::{Realized, realize};

/// Writes the `reference` artefact.
pub struct Reference {
    dir: PathBuf,
    writer: Writer,
    regions: Vec<Region>,
    extra: Vec<ExtraFile>,
    names: BTreeSet<String>,
    /// Where a checkpoint tensor that is used as it is was stored.
    plain: BTreeMap<(String, Elem), String>,
}

impl Reference {
    /// The file with the weights.
    pub const WEIGHTS: &'static str = "weights.safetensors";
    /// The file with the tensors' checksums.
    pub const CHECKSUMS: &'static str = "checksums.json";
    /// The file with the module.
    pub const MODULE: &'static str = "module.awqir";
    /// The file with the module as compiled.
    pub const PROVENANCE: &'static str = "provenance.awqir";

    /// An emitter into the empty folder `dir`; `extra` is copied.
    pub fn new(dir: &Path, extra: Vec<ExtraFile>) -> Self {
        Self {
            dir: dir.to_owned(),
            writer: Writer::new(dir, "weights"),
            regions: Vec::new(),
            extra,
            names: BTreeSet::new(),
            plain: BTreeMap::new(),
        }
    }

    /// A name that no tensor has yet.
    fn fresh(&mut self, base: String) -> String {
        let mut name = base.clone();
        let mut n = 2;
        while !self.names.insert(name.clone()) {
            name = format!("{base}_{n}");
            n += 1;
        }
        name
    }

    /// Stores a weight; returns the term and type that stand for it.
    fn store(&mut self, out: &mut Region, id: WeightId, realized: Realized) -> Result<(), EmitError> {
        let label = out.weight(id).name.as_deref().map_or_else(|| format!("w{}", id.index()), str::to_owned);
        let ty = out.weight(id).ty.clone();
        let base = match &out.name {
            RegionName::Layer(_) => label,
            RegionName::Named(region) => format!("{region}.{label}"),
        };
        let name = relative(out, &self.fresh(out.tensor_name(&base)));
        let full = out.tensor_name(&name);
        match realized {
            Realized::Float { shape, data } => {
                let tensor = encode(ty.elem, shape, &data).map_err(|at| {
                    EmitError::Unsupported(format!("tensor `{full}`: element {at} does not fit {}", ty.elem))
                })?;
                self.writer.add(&full, &tensor)?;
                out.set_weight(id, WeightExpr::Source(name.into()), Type::new(ty.elem, ty.shape));
            }
            Realized::Quant(codes) => {
                let layout = ty.layout.unwrap_or(Layout::Rows);
                self.parts(out, id, &full, &codes, layout)?;
                let ty = Type { layout: Some(layout), ..ty };
                out.set_weight(id, WeightExpr::Packed { tensor: name.into(), layout }, ty);
            }
        }
        Ok(())
    }

    fn parts(
        &mut self,
        region: &Region,
        id: WeightId,
        stem: &str,
        codes: &Codes,
        layout: Layout,
    ) -> Result<(), EmitError> {
        let parts = layout::pack(codes, layout).map_err(|source| EmitError::Layout {
            region: region.name.to_string(),
            weight: region.weight(id).name.as_deref().unwrap_or("").to_owned(),
            source,
        })?;
        parts.iter().try_for_each(|part| self.writer.add(&format!("{stem}{}", part.suffix), &part.tensor))
    }
}

/// The name below the region's prefix.
fn relative(region: &Region, full: &str) -> String {
    full.strip_prefix(&*region.prefix).and_then(|n| n.strip_prefix('.')).unwrap_or(full).to_owned()
}

impl Emitter for Reference {
    fn region(&mut self, region: &Region, cx: &EmitCx<'_>) -> Result<(), EmitError> {
        let mut out = region.clone();
        // Layers have a prefix, so that equal layers print once; the other regions may share tensors by full name.
        out.prefix = match &region.name {
            RegionName::Layer(i) => format!("layers.{i}").into(),
            RegionName::Named(_) => "".into(),
        };
        for id in region.used_weights() {
            let weight = region.weight(id);
            let key = match (&weight.expr, &region.name) {
                (WeightExpr::Source(name), RegionName::Named(_)) => Some((region.tensor_name(name), weight.ty.elem)),
                (_, RegionName::Named(_) | RegionName::Layer(_)) => None,
            };
            if let Some(stored) = key.as_ref().and_then(|k| self.plain.get(k)) {
                out.set_weight(id, WeightExpr::Source(stored.as_str().into()), weight.ty.clone());
                continue;
            }
            self.store(&mut out, id, realize(region, id, cx.source)?)?;
            if let (Some(key), WeightExpr::Source(name)) = (key, &out.weight(id).expr) {
                self.plain.insert(key, out.tensor_name(name));
            }
        }
        out.compact();
        self.regions.push(out);
        Ok(())
    }

    fn finish(self: Box<Self>, module: Verified<'_>) -> Result<Emitted, EmitError> {
        let Self { dir, writer, regions, extra, .. } = *self;
        let out =
            Module { regions, fused: module.fused.iter().map(packed_signature).collect(), ..Module::clone(&module) };
        verify(&out).map_err(|e| EmitError::Unsupported(format!("the stored module does not verify:\n{e}")))?;
        let tensor_bytes = writer.bytes();
        write(&dir.join(Self::CHECKSUMS), format!("{:#}\n", writer.checksums()).as_bytes())?;
        writer.finish(&dir.join(Self::WEIGHTS), &[("format", "awqc")])?;
        write(&dir.join(Self::MODULE), print(&out).as_bytes())?;
        write(&dir.join(Self::PROVENANCE), print(&module).as_bytes())?;
        let mut files = write_extra(&dir, &extra)?;
        files.extend([Self::WEIGHTS, Self::CHECKSUMS, Self::MODULE, Self::PROVENANCE].map(str::to_owned));
        files.sort();
        Ok(Emitted { files, tensor_bytes })
    }
}

/// A fused op whose quantized weight parameters have the layout in which they are stored.
fn packed_signature(def: &FusedDef) -> FusedDef {
    let mut def = def.clone();
    let params: Vec<WeightId> = def.body.params().iter().filter_map(|p: &Operand| p.weight()).collect();
    for id in params {
        let weight = def.body.weight(id).clone();
        if weight.ty.elem.quant().is_some() && weight.ty.layout.is_none() {
            def.body.set_weight(id, weight.expr, Type { layout: Some(Layout::Rows), ..weight.ty });
        }
    }
    def
}
