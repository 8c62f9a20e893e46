//! The numbers of a program: where a mapped file holds them in the form that is needed, they stay there.

use std::borrow::Cow;

use awqc_exec::layout::r16;
use awqc_exec::realize::{Realized, realize};
use awqc_ir::panels::Panels;
use awqc_ir::{Layout, Region, Stored, TensorSource, WeightExpr, WeightId};
use awqc_passes::ExecError;

use crate::CpuError;
use crate::memory::{Bytes, Memory, Pages};
use crate::program::Dense;

/// Where packed weights go.
pub(super) struct Home {
    pub(super) pages: Pages,
    pub(super) memory: Memory,
}

/// The matrix of a linear.
pub(super) enum Matrix<'a> {
    /// Low-bit codes in panels.
    Packed {
        /// The panels.
        bytes: Bytes<'a>,
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
        Stored::F64 | Stored::U8 | Stored::I8 | Stored::I16 | Stored::I32 | Stored::I64 => None,
    }
}

/// A small parameter as f32.
pub(super) fn vector(region: &Region, id: WeightId, source: &dyn TensorSource) -> Result<Vec<f32>, CpuError> {
    Ok(realize(region, id, source)?.into_tensor().data)
}

/// A float matrix, or matrices one below the other: as they lie in a mapped file, or else realized.
pub(super) fn dense<'a>(region: &Region, id: WeightId, source: &'a dyn TensorSource) -> Result<Dense<'a>, CpuError> {
    let Some((rows, cols)) = region.weight(id).ty.matrix() else {
        return Err(CpuError::Unsupported(format!("region {}: {} is no matrix", region.name, region.weight(id).ty)));
    };
    if let Some((bytes, stored)) = bytes(region, id, source) {
        return Ok(Dense { bytes, stored, rows, cols });
    }
    let data = realize(region, id, source)?.into_tensor().data;
    let bytes = Cow::Owned(data.iter().flat_map(|v| v.to_le_bytes()).collect());
    Ok(Dense { bytes, stored: Stored::F32, rows, cols })
}

/// The matrix of a linear, or those of experts one below the other: panels as they lie in a mapped file, or packed now.
pub(super) fn matrix<'a>(
    region: &Region,
    id: WeightId,
    source: &'a dyn TensorSource,
    home: &mut Home,
) -> Result<Matrix<'a>, CpuError> {
    let weight = region.weight(id);
    let (Some(quant), Some((rows, cols))) = (weight.ty.elem.quant(), weight.ty.matrix()) else {
        return Ok(Matrix::Dense(dense(region, id, source)?));
    };
    let shape = Panels::of(quant, rows, cols)
        .ok_or_else(|| CpuError::Unsupported(format!("region {}: {} is too large", region.name, weight.ty)))?;
    if let WeightExpr::Packed { tensor, layout: Layout::R16 } = &weight.expr
        && let name = format!("{}{}", region.tensor_name(tensor), r16::SUFFIX)
        && let Some(bytes) = source.mapped(&name)
        && bytes.len() == shape.total_bytes()
    {
        let bytes = match home.pages {
            Pages::Map => Cow::Borrowed(bytes),
            // Read and not copied from the map, whose pages would count as this process's memory too.
            Pages::Huge => Cow::Owned(source.read(&name).map_err(|e| ExecError::Tensor(e.0))?.bytes),
        };
        return Ok(Matrix::Packed { bytes: home.memory.take(bytes, home.pages), shape });
    }
    match realize(region, id, source)? {
        Realized::Quant(codes) => {
            let bytes = r16::panels(&codes).map_err(|e| CpuError::Unsupported(e.0))?;
            Ok(Matrix::Packed { bytes: home.memory.take(Cow::Owned(bytes), home.pages), shape })
        }
        Realized::Float { .. } => {
            Err(CpuError::Unsupported(format!("region {}: {} is not quantized", region.name, weight.ty)))
        }
    }
}
