//! Checkpoints that are quantized already. A *scheme* says which tensors a packed weight consists of, and how its
//! codes, scales and zero points lie in them; no family knows of it. What comes out is one of the language's own
//! layouts: the codes stay what they are. Only where the columns of a group are no neighbours, as GPTQ with `desc_act`
//! leaves them, the weight is read as floats.

mod awq;
mod compressed;
mod fields;
mod gptq;
mod recoded;
mod settings;
mod unpacked;

use std::path::Path;

use awqc_ir::{Dim, Elem, Layout, Quant, Stored, TensorSource, Type};
use serde_json::{Map, Value as Json};

use crate::error::ImportError;
use crate::family::show;
use awq::Awq;
use compressed::Compressed;
use gptq::Gptq;
pub(crate) use recoded::Recoded;
use settings::Settings;
pub(crate) use unpacked::Unpacked;

/// How a checkpoint is quantized.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Scheme {
    Awq(Awq),
    Gptq(Gptq),
    Compressed(Compressed),
}

/// What the tensor of codes ends in, over all schemes.
pub(crate) const CODES: [&str; 2] = [".qweight", ".weight_packed"];

/// What any tensor of a packed weight ends in.
pub(crate) const PARTS: [&str; 10] = [
    ".qweight",
    ".qzeros",
    ".scales",
    ".scaled_zeros",
    ".g_idx",
    ".weight_packed",
    ".weight_scale",
    ".weight_zero_point",
    ".weight_shape",
    ".weight_g_idx",
];

/// Settings in a file of their own, as older programs wrote them, and the method that such a file means.
pub(crate) const FILES: [(&str, &str); 2] = [("quant_config.json", "awq"), ("quantize_config.json", "gptq")];

/// A packed weight that was understood.
#[derive(Debug)]
pub(crate) struct Packed {
    /// The tensors that it consists of.
    pub(crate) tensors: Vec<String>,
    pub(crate) held: Held,
}

/// How a packed weight lies in the checkpoint.
#[derive(Debug)]
pub(crate) enum Held {
    /// In a layout of the language.
    AsIs(Quant, Layout),
    /// In another one.
    Recoded(Recoded),
}

/// A `[rows, cols]` weight whose tensors begin with `stem`.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    stem: &'a str,
    rows: usize,
    cols: usize,
    source: &'a dyn TensorSource,
}

impl Matrix<'_> {
    /// Checks that the tensor of this suffix has one of the types and the shape.
    fn expect(&self, suffix: &str, stored: &[Stored], shape: &[usize]) -> Result<(), String> {
        let name = format!("{}{suffix}", self.stem);
        let Some(info) = self.source.info(&name) else {
            return Err(format!("`{name}` is missing, but the weight is packed"));
        };
        if stored.contains(&info.stored) && info.shape == shape {
            return Ok(());
        }
        let types: Vec<String> = stored.iter().map(Stored::to_string).collect();
        Err(format!(
            "`{name}` is {} {:?}; {} {shape:?} is needed for {} outputs and {} inputs",
            info.stored,
            info.shape,
            types.join(" or "),
            self.rows,
            self.cols
        ))
    }

    fn has(&self, suffix: &str) -> bool {
        self.source.info(&format!("{}{suffix}", self.stem)).is_some()
    }

    fn name(&self, suffix: &str) -> String {
        format!("{}{suffix}", self.stem)
    }

    /// The group of each column, if the tensor of this suffix says so; `None` where groups are runs of neighbours.
    fn scattered(&self, suffix: &str, quant: Quant) -> Result<Option<Vec<u32>>, String> {
        self.expect(suffix, &[Stored::I32, Stored::I64], &[self.cols])?;
        let name = self.name(suffix);
        let raw = self.source.read(&name).map_err(|e| e.0)?;
        let of = raw.to_i32().unwrap_or_default();
        let (len, groups) = (quant.group.len(self.cols), quant.group.count(self.cols));
        // Compressed-tensors writes -1 for an order that it did not change.
        if of.iter().enumerate().all(|(c, g)| *g == (c / len) as i32) || of.iter().all(|g| *g == -1) {
            return Ok(None);
        }
        let fits = |g: &i32| u32::try_from(*g).ok().filter(|g| (*g as usize) < groups);
        let of: Option<Vec<u32>> = of.iter().map(fits).collect();
        of.map(Some).ok_or_else(|| format!("`{name}` holds groups beyond the {groups} that the weight has"))
    }
}

/// Floats that scales are stored in.
const FLOATS: [Stored; 3] = [Stored::F16, Stored::Bf16, Stored::F32];

impl Scheme {
    /// Reads `quantization_config` of a configuration; `None` if the model is not quantized.
    pub(crate) fn of_config(path: &Path, config: &Map<String, Json>) -> Result<Option<Self>, ImportError> {
        match config.get("quantization_config").or_else(|| config.get("compression_config")) {
            None | Some(Json::Null) => Ok(None),
            Some(Json::Object(map)) => Self::read(path, "quantization_config.", map, None).map(Some),
            Some(other) => Err(ImportError::config(
                path,
                "quantization_config",
                format!("is {}; an object is needed", show(other)),
            )),
        }
    }

    /// Reads settings. `usual` is the method that they mean if they name none.
    pub(crate) fn read(
        path: &Path,
        prefix: &str,
        map: &Map<String, Json>,
        usual: Option<&str>,
    ) -> Result<Self, ImportError> {
        let settings = Settings { path, prefix, map };
        match settings.text("quant_method")?.as_deref().or(usual) {
            Some("awq") => Awq::read(settings).map(Scheme::Awq),
            Some("gptq") => Gptq::read(settings).map(Scheme::Gptq),
            Some("compressed-tensors") => Compressed::read(settings).map(Scheme::Compressed),
            Some(other) => Err(settings.refuse(format!("the model is quantized by `{other}`"))),
            None => Err(settings.refuse("the model is quantized by a method that `quantization_config` does not name")),
        }
    }

    /// What the tensor of codes ends in.
    fn codes(&self) -> &'static str {
        match self {
            Scheme::Awq(_) | Scheme::Gptq(_) => CODES[0],
            Scheme::Compressed(_) => CODES[1],
        }
    }

    /// The stem whose parts hold the weight `name`, if the checkpoint has them instead of it.
    pub(crate) fn stem<'n>(&self, name: &'n str, has: impl Fn(&str) -> bool) -> Option<&'n str> {
        name.strip_suffix(".weight").filter(|stem| has(&format!("{stem}{}", self.codes())) && !has(name))
    }

    /// The packed weight at `stem`, of the logical shape of `float`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn packed(&self, stem: &str, float: &Type, source: &dyn TensorSource) -> Result<Packed, String> {
        let [Dim::Const(rows), Dim::Const(cols)] = float.shape[..] else {
            return Err(format!("`{stem}` is packed, but {float} is no matrix"));
        };
        let (Ok(rows), Ok(cols)) = (usize::try_from(rows), usize::try_from(cols)) else {
            return Err(format!("`{stem}` is too large"));
        };
        let matrix = Matrix { stem, rows, cols, source };
        match self {
            Scheme::Awq(awq) => awq.packed(matrix),
            Scheme::Gptq(gptq) => gptq.packed(matrix),
            Scheme::Compressed(compressed) => compressed.packed(matrix),
        }
    }
}

impl Packed {
    /// The type that a weight of this logical shape has; `None` if it is read as floats.
    pub(crate) fn ty(&self, float: &Type) -> Option<Type> {
        let (quant, layout) = match &self.held {
            Held::AsIs(quant, layout) => (*quant, *layout),
            Held::Recoded(r) if r.scattered.is_some() => return None,
            Held::Recoded(r) => (r.quant, Layout::Rows),
        };
        Some(Type { elem: Elem::Quant(quant), layout: Some(layout), shape: float.shape.clone() })
    }
}

#[cfg(test)]
mod tests;
