//! The numbers of a program: where a mapped file holds them in the form that is needed, they stay there.

use std::borrow::Cow;

use awqc_exec::layout::r16;
use awqc_exec::realize::{Realized, realize};
use awqc_ir::panels::Panels;
use awqc_ir::{Layout, Region, Stored, TensorSource, WeightExpr, WeightId};

use crate::CpuError;
use crate::program::Dense;

/// The matrix of a linear.
pub(super) enum Matrix<'a> {
    /// Low-bit codes in panels.
    Packed {
        /// The panels.
        bytes: Cow<'a, [u8]>,
        /// Their shape.
        shape: Panels,
    },
    /// Floats.
    Dense(Dense<'a>),
}

fn bytes<'a>(region: &Region, id: WeightId, source: &'a dyn TensorSource) -> Option<(Cow<'a, [u8]>, Stored)> {
    let WeightExpr::Source(name) = &region.weight(id).expr else { return None };
    let name = region.tensor_name(name);
    let stored = source.info(&name)?.stored;
    match stored {
        Stored::F32 | Stored::F16 | Stored::Bf16 => Some((Cow::Borrowed(source.mapped(&name)?), stored)),
        Stored::F64 | Stored::U8 | Stored::I32 | Stored::I64 => None,
    }
}

/// A small parameter as f32.
pub(super) fn vector(region: &Region, id: WeightId, source: &dyn TensorSource) -> Result<Vec<f32>, CpuError> {
    Ok(realize(region, id, source)?.into_tensor().data)
}

/// A float matrix: as it lies in a mapped file, or else realized.
pub(super) fn dense<'a>(region: &Region, id: WeightId, source: &'a dyn TensorSource) -> Result<Dense<'a>, CpuError> {
    let shape = region.weight(id).ty.const_shape();
    let Some(&[rows, cols]) = shape.as_deref() else {
        return Err(CpuError::Unsupported(format!("region {}: {} is no matrix", region.name, region.weight(id).ty)));
    };
    if let Some((bytes, stored)) = bytes(region, id, source) {
        return Ok(Dense { bytes, stored, rows, cols });
    }
    let data = realize(region, id, source)?.into_tensor().data;
    let bytes = Cow::Owned(data.iter().flat_map(|v| v.to_le_bytes()).collect());
    Ok(Dense { bytes, stored: Stored::F32, rows, cols })
}

/// The matrix of a linear: panels as they lie in a mapped file, or packed now.
pub(super) fn matrix<'a>(region: &Region, id: WeightId, source: &'a dyn TensorSource) -> Result<Matrix<'a>, CpuError> {
    let weight = region.weight(id);
    let (Some(quant), Some(&[rows, cols])) = (weight.ty.elem.quant(), weight.ty.const_shape().as_deref()) else {
        return Ok(Matrix::Dense(dense(region, id, source)?));
    };
    let shape = Panels::of(quant, rows, cols)
        .ok_or_else(|| CpuError::Unsupported(format!("region {}: {} is too large", region.name, weight.ty)))?;
    if let WeightExpr::Packed { tensor, layout: Layout::R16 } = &weight.expr
        && let Some(bytes) = source.mapped(&format!("{}{}", region.tensor_name(tensor), r16::SUFFIX))
        && bytes.len() == shape.total_bytes()
    {
        return Ok(Matrix::Packed { bytes: Cow::Borrowed(bytes), shape });
    }
    match realize(region, id, source)? {
        Realized::Quant(codes) => {
            let bytes = r16::panels(&codes).map_err(|e| CpuError::Unsupported(e.0))?;
            Ok(Matrix::Packed { bytes: Cow::Owned(bytes), shape })
        }
        Realized::Float { .. } => {
            Err(CpuError::Unsupported(format!("region {}: {} is not quantized", region.name, weight.ty)))
        }
    }
}
