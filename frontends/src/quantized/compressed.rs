//! compressed-tensors, the format `pack-quantized`: integers of a few bits along the inputs, scales by group, row or
//! for the whole weight, zero points packed along the outputs. Which of the configuration's groups a weight belongs to
//! is read off its tensors, not off the names in `targets`.
//!
//! Codes of three bits run across words in files since 2026; older ones leave two bits of each word empty.

use awqc_ir::{Group, Quant, Stored};
use serde_json::{Map, Value as Json};

use super::fields::Fields;
use super::recoded::{Codes, Order, Recoded, Table, Zeros};
use super::settings::Settings;
use super::{FLOATS, Held, Matrix, Packed};
use crate::error::ImportError;

/// See the module documentation.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Compressed {
    pub(super) groups: Vec<Weights>,
}

/// How the weights of a group are quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Weights {
    pub(super) quant: Quant,
    /// One scale for the whole weight.
    tensor: bool,
    act_order: bool,
}

const FORMAT: &str = "pack-quantized";

impl Compressed {
    pub(super) fn read(settings: Settings<'_>) -> Result<Self, ImportError> {
        let refuse = |what: String| settings.refuse(format!("the model is quantized by `compressed-tensors` {what}"));
        let format = settings.text("format")?;
        if let Some(sparse) = settings.object("sparsity_config")?.and_then(|s| s.get("format")).and_then(Json::as_str)
            && sparse != "dense"
        {
            return Err(refuse(format!("with the sparse format `{sparse}`")));
        }
        for key in ["kv_cache_scheme", "transform_config"] {
            if settings.object(key)?.is_some_and(|map| !map.is_empty()) {
                return Err(refuse(format!("with a `{key}`")));
            }
        }
        let mut groups = Vec::new();
        for (name, group) in settings.object("config_groups")?.into_iter().flatten() {
            let prefix = format!("{}config_groups.{name}.", settings.prefix);
            let Json::Object(map) = group else {
                return Err(settings.bad(&format!("config_groups.{name}"), group, "an object is needed"));
            };
            let group = Settings { path: settings.path, prefix: &prefix, map };
            match group.text("format")?.or_else(|| format.clone()).as_deref() {
                None | Some(FORMAT) => {}
                Some(other) => return Err(refuse(format!("in the format `{other}`"))),
            }
            for key in ["input_activations", "output_activations"] {
                if group.object(key)?.is_some() {
                    return Err(refuse(format!("with `{key}`")));
                }
            }
            if let Some(weights) = group.object("weights")? {
                groups.push(weights_of(settings, &format!("{prefix}weights."), weights)?);
            }
        }
        if groups.is_empty() {
            return Err(ImportError::config(
                settings.path,
                format!("{}config_groups", settings.prefix),
                "has no group with `weights`; one is needed",
            ));
        }
        groups.dedup();
        Ok(Self { groups })
    }

    pub(super) fn packed(&self, m: Matrix<'_>) -> Result<Packed, String> {
        let mut problems = Vec::new();
        for weights in &self.groups {
            match weights.packed(m) {
                Ok(packed) => return Ok(packed),
                Err(problem) => problems.push(problem),
            }
        }
        problems.dedup();
        Err(problems.join(", or "))
    }
}

fn weights_of(settings: Settings<'_>, prefix: &str, map: &Map<String, Json>) -> Result<Weights, ImportError> {
    let of = Settings { path: settings.path, prefix, map };
    let refuse = |what: String| settings.refuse(format!("the model is quantized by `compressed-tensors` {what}"));
    if let Some(kind) = of.text("type")?.filter(|t| t != "int") {
        return Err(refuse(format!("to `{kind}` numbers")));
    }
    if of.flag("dynamic")? == Some(true) {
        return Err(refuse("with `dynamic` weights".into()));
    }
    let bits = of.bits(&["num_bits"], &Quant::BITS)?.unwrap_or(8);
    let symmetric = of.flag("symmetric")?.unwrap_or(true);
    let size = of.group(&["group_size"])?;
    let strategy = of.text("strategy")?;
    let (group, tensor) = match (strategy.as_deref(), size) {
        (Some("group"), Some(group)) | (None, Some(group)) => (group, false),
        (Some("channel"), _) => (Group::Row, false),
        (Some("tensor"), _) | (None, None) => (Group::Row, true),
        (Some("group"), None) => {
            return Err(ImportError::config(of.path, format!("{prefix}group_size"), "is missing; `group` needs it"));
        }
        (Some(other), _) => return Err(refuse(format!("with the strategy `{other}`"))),
    };
    let act_order = match of.get("actorder") {
        None | Some(Json::Bool(false)) => false,
        Some(Json::Bool(true)) => true,
        Some(Json::String(s)) => match s.to_lowercase().as_str() {
            "group" | "dynamic" => true,
            // Only the order in which codes were chosen: the weight is as any other.
            "weight" | "static" => false,
            other => return Err(refuse(format!("with the `actorder` `{other}`"))),
        },
        Some(other) => return Err(of.bad("actorder", other, "`group`, `weight`, true, false or null is needed")),
    };
    Ok(Weights { quant: Quant { bits, symmetric, group }, tensor, act_order })
}

impl Weights {
    fn packed(&self, m: Matrix<'_>) -> Result<Packed, String> {
        let Matrix { stem, rows, cols, .. } = m;
        let quant = self.quant;
        if let Group::Size(g) = quant.group
            && !cols.is_multiple_of(g as usize)
        {
            return Err(format!("`{stem}`: {cols} inputs are no multiple of the group size {g}"));
        }
        let groups = quant.group.count(cols);
        let dense = Fields { bits: quant.bits, lines: rows, len: cols, down: false, whole: false };
        let whole = Fields { whole: true, ..dense };
        let found = m.source.info(&m.name(".weight_packed")).map(|i| i.shape);
        let whole = dense.shape() != whole.shape() && found == Some(whole.shape());
        if dense.bits == 3 && (11..31).contains(&cols) {
            return Err(format!("`{stem}`: {cols} codes of 3 bits can be read in two ways"));
        }
        let codes = Fields { whole, ..dense };
        m.expect(".weight_packed", &[Stored::I32], &codes.shape())?;
        let mut tensors = vec![m.name(".weight_packed"), m.name(".weight_scale")];
        if m.has(".weight_shape") {
            m.expect(".weight_shape", &[Stored::I64, Stored::I32], &[2])?;
            let name = m.name(".weight_shape");
            let shape = m.source.read(&name).map_err(|e| e.0)?.to_i32().unwrap_or_default();
            if shape.iter().map(|d| i64::from(*d)).ne([rows as i64, cols as i64]) {
                return Err(format!("`{name}` says {shape:?}; by the configuration it must be [{rows}, {cols}]"));
            }
            tensors.push(name);
        }
        // One scale is stored as a scalar or as a vector of one.
        let order = |suffix: &str, stored: &[Stored]| {
            if !self.tensor {
                return m.expect(suffix, stored, &[rows, groups]).map(|()| Order::Rows(groups));
            }
            m.expect(suffix, stored, &[1]).or_else(|_| m.expect(suffix, stored, &[])).map(|()| Order::One)
        };
        let scales = Table { name: m.name(".weight_scale"), order: order(".weight_scale", &FLOATS)? };
        let zeros = match (quant.symmetric, m.has(".weight_zero_point")) {
            (true, false) => Zeros::Middle,
            (true, true) => {
                return Err(format!("`{}` is there, but the weights are symmetric", m.name(".weight_zero_point")));
            }
            (false, _) => {
                let name = m.name(".weight_zero_point");
                tensors.push(name.clone());
                if self.tensor {
                    let order = order(".weight_zero_point", &[Stored::I8, Stored::I32, Stored::I64])?;
                    Zeros::Signed(Table { name, order })
                } else {
                    let fields = Fields { bits: quant.bits, lines: groups, len: rows, down: true, whole };
                    m.expect(".weight_zero_point", &[Stored::I32], &fields.shape())?;
                    Zeros::Fields { name, fields, by_group: true, less_one: false }
                }
            }
        };
        let scattered = if m.has(".weight_g_idx") {
            tensors.push(m.name(".weight_g_idx"));
            m.scattered(".weight_g_idx", quant)?
        } else if self.act_order {
            return Err(format!("`{}` is missing, but `actorder` is `group`", m.name(".weight_g_idx")));
        } else {
            None
        };
        let codes = Codes::Fields(m.name(".weight_packed"), codes);
        Ok(Packed { tensors, held: Held::Recoded(Recoded { quant, rows, cols, scattered, codes, scales, zeros }) })
    }
}
