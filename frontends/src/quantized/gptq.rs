//! GPTQ checkpoints (AutoGPTQ, GPTQModel): words of neighbouring inputs down the columns of `qweight`, zero points in
//! words of neighbouring outputs, and `g_idx`, the group of each input.
//!
//! In the first form, `gptq`, every zero point was stored with 1 taken away, from whole words where a zero point was 0;
//! in the second, `gptq_v2`, as it is. For three bits the programs do not agree on how the first form takes 1 away, so
//! there only symmetric weights are read: theirs is known.

use awqc_ir::{Group, Quant, Stored};

use super::fields::Fields;
use super::recoded::{Codes, Order, Recoded, Table, Zeros};
use super::settings::Settings;
use super::{FLOATS, Held, Matrix, Packed};
use crate::error::ImportError;
use crate::family::show;

/// See the module documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gptq {
    pub(super) quant: Quant,
    less_one: bool,
    act_order: bool,
}

impl Gptq {
    pub(super) fn read(settings: Settings<'_>) -> Result<Self, ImportError> {
        let format = match settings.text("checkpoint_format")? {
            Some(format) => Some(format),
            None => settings.text("format")?,
        };
        let less_one = match format.as_deref() {
            None | Some("gptq") => true,
            Some("gptq_v2") => false,
            Some(other) => {
                return Err(settings.refuse(format!("the model is quantized by `gptq` in the format `{other}`")));
            }
        };
        if settings.flag("is_marlin_format")? == Some(true) {
            return Err(settings.refuse("the model is quantized by `gptq` in the format `marlin`"));
        }
        if let Some(other) = settings.text("pack_dtype")?.filter(|t| t != "int32" && t != "torch.int32") {
            return Err(settings.refuse(format!("the model is quantized by `gptq` and packed in `{other}`")));
        }
        // Rules that begin with `-:` leave modules as floats, which the tensors say too.
        for (rule, value) in settings.object("dynamic")?.into_iter().flatten() {
            if !rule.starts_with("-:") {
                return Err(settings.refuse(format!(
                    "`{}dynamic` has settings of their own for `{rule}`: {}",
                    settings.prefix,
                    show(value)
                )));
            }
        }
        let bits = settings.bits(&["bits"], &Quant::BITS)?;
        let bits = bits.ok_or_else(|| {
            ImportError::config(settings.path, format!("{}bits", settings.prefix), "is missing; 2, 3, 4 or 8 is needed")
        })?;
        let symmetric = settings.flag("sym")?.unwrap_or(true);
        if bits == 3 && less_one && !symmetric {
            return Err(settings.refuse(
                "the model is quantized by `gptq` with zero points of 3 bits, which programs store in different ways: convert it to `gptq_v2`",
            ));
        }
        let group = settings.group(&["group_size"])?.unwrap_or(Group::Size(128));
        let act_order = settings.flag("desc_act")?.unwrap_or(false);
        Ok(Self { quant: Quant { bits, symmetric, group }, less_one, act_order })
    }

    pub(super) fn packed(&self, m: Matrix<'_>) -> Result<Packed, String> {
        let Matrix { stem, rows, cols, source } = m;
        let quant = self.quant;
        let (bits, groups) = (quant.bits, quant.group.count(cols));
        for (what, len) in [("inputs", cols), ("outputs", rows)] {
            if !(len * usize::from(bits)).is_multiple_of(32) {
                return Err(format!("`{stem}`: {len} {what} of {bits} bits do not fill words"));
            }
        }
        let codes = Fields { bits, lines: rows, len: cols, down: true, whole: false };
        let zeros = Fields { bits, lines: groups, len: rows, down: false, whole: false };
        m.expect(".qweight", &[Stored::I32], &codes.shape())?;
        m.expect(".qzeros", &[Stored::I32], &zeros.shape())?;
        m.expect(".scales", &FLOATS, &[groups, rows])?;
        let mut tensors: Vec<String> = [".qweight", ".qzeros", ".scales"].map(|s| m.name(s)).into();
        let scattered = if m.has(".g_idx") {
            tensors.push(m.name(".g_idx"));
            m.scattered(".g_idx", quant)?
        } else if self.act_order {
            return Err(format!("`{}` is missing, but the model was quantized with `desc_act`", m.name(".g_idx")));
        } else {
            None
        };
        if quant.symmetric {
            let words = source.read(&m.name(".qzeros")).map_err(|e| e.0)?.bytes;
            let middle = middle(zeros, self.less_one);
            if words
                .as_chunks::<4>()
                .0
                .iter()
                .enumerate()
                .any(|(i, w)| !middle.iter().any(|m| m.get(i % m.len().max(1)) == Some(&u32::from_le_bytes(*w))))
            {
                return Err(format!(
                    "`{}` holds other zero points than {}, though the settings say `sym`: set `sym` to false",
                    m.name(".qzeros"),
                    1 << (bits - 1)
                ));
            }
        }
        let zeros = if quant.symmetric {
            Zeros::Middle
        } else {
            Zeros::Fields { name: m.name(".qzeros"), fields: zeros, by_group: true, less_one: self.less_one }
        };
        let held = Held::Recoded(Recoded {
            quant,
            rows,
            cols,
            scattered,
            codes: Codes::Fields(m.name(".qweight"), codes),
            scales: Table { name: m.name(".scales"), order: Order::Groups(groups) },
            zeros,
        });
        Ok(Packed { tensors, held })
    }
}

/// The words that a line of zero points of symmetric weights can consist of: all fields the middle of the codes, with 1
/// taken away from each if `less_one`. GPTQModel takes these numbers from words of three bits, which is not 1 from
/// each.
fn middle(fields: Fields, less_one: bool) -> Vec<Vec<u32>> {
    const THREE_BITS: [u32; 3] = [0x2492_4924, 0x9249_2492, 0x4924_9249];
    let middle = 1u8 << (fields.bits - 1);
    let line = |value: u8| {
        let bytes = awqc_ir::streams::pack(&vec![value; fields.len], fields.len, fields.bits);
        bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect::<Vec<_>>()
    };
    if !less_one {
        return vec![line(middle)];
    }
    let mut out = vec![line(middle - 1)];
    if fields.bits == 3 {
        out.push(
            line(middle).into_iter().zip(THREE_BITS.into_iter().cycle()).map(|(w, c)| w.wrapping_sub(c)).collect(),
        );
    }
    out
}
