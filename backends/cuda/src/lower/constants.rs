//! Tensors of the artefact that kernels read, and what can be said of a module before it is compiled.

use awqc_exec::coverage::without_kernels;
use awqc_exec::layout::mma16;
use awqc_ir::inline::inline_fused;
use awqc_ir::tiles::Tiles;
use awqc_ir::{Layout, Module, Op, Quant, Region, Stored, TensorSource, Type, WeightExpr, WeightId};

use crate::CudaError;
use crate::kernels::Float;
use crate::kernels::attend::Shape;
use crate::kernels::rows::Choice;
use crate::plan::{Constant, Form};

/// The constants of a plan so far.
pub(super) struct Constants<'a> {
    source: &'a dyn TensorSource,
    pub(super) list: Vec<Constant>,
}

/// The weight of a product.
#[derive(Clone, Copy, Debug)]
pub(super) enum Matrix {
    Packed { weight: usize, shape: Tiles },
    Dense { weight: usize, of: Float },
}

impl<'a> Constants<'a> {
    pub(super) fn new(source: &'a dyn TensorSource) -> Self {
        Self { source, list: Vec::new() }
    }

    fn add(&mut self, tensor: String, form: Form) -> usize {
        let constant = Constant { tensor, form };
        self.list.iter().position(|c| *c == constant).unwrap_or_else(|| {
            self.list.push(constant);
            self.list.len() - 1
        })
    }

    /// A small parameter, widened to f32, plus a number.
    pub(super) fn vector(
        &mut self,
        region: &Region,
        id: Option<WeightId>,
        add: f32,
    ) -> Result<Option<usize>, CudaError> {
        let Some(id) = id else { return Ok(None) };
        let (name, _) = self.stored(region, id)?;
        Ok(Some(self.add(name, Form::F32 { add })))
    }

    /// Numbers in a weight.
    pub(super) fn len(&self, region: &Region, id: WeightId) -> usize {
        region.weight(id).ty.const_len().unwrap_or(0)
    }

    /// A float matrix, or those of experts one below the other: the constant, its type, rows and columns.
    pub(super) fn float_matrix(
        &mut self,
        region: &Region,
        id: WeightId,
    ) -> Result<(usize, Float, usize, usize), CudaError> {
        let (name, of) = self.stored(region, id)?;
        let ty = &region.weight(id).ty;
        let Some((rows, cols)) = ty.matrix() else {
            return Err(CudaError::Unsupported(format!("region {}: {ty} is no matrix", region.name)));
        };
        Ok((self.add(name, Form::Stored), of, rows, cols))
    }

    /// The weight of a product; matrices of experts lie one below the other.
    pub(super) fn matrix(&mut self, region: &Region, id: WeightId) -> Result<Matrix, CudaError> {
        let weight = region.weight(id);
        let (Some(quant), Some((rows, cols))) = (weight.ty.elem.quant(), weight.ty.matrix()) else {
            let (weight, of, _, _) = self.float_matrix(region, id)?;
            return Ok(Matrix::Dense { weight, of });
        };
        let WeightExpr::Packed { tensor, layout: Layout::Mma16 } = &weight.expr else {
            return Err(CudaError::Unsupported(format!(
                "region {}: the weight {} is not packed for tensor cores: end the pipeline with pack{{layout=mma16}}",
                region.name, weight.ty
            )));
        };
        let shape = covered(region, quant, rows, cols)?;
        let name = format!("{}{}", region.tensor_name(tensor), mma16::SUFFIX);
        Ok(Matrix::Packed { weight: self.add(name, Form::Stored), shape })
    }

    /// The name and type of a weight that is stored as floats.
    fn stored(&self, region: &Region, id: WeightId) -> Result<(String, Float), CudaError> {
        let weight = region.weight(id);
        let WeightExpr::Source(name) = &weight.expr else {
            let label = weight.name.as_deref().unwrap_or("a weight");
            return Err(CudaError::Unsupported(format!(
                "region {}: ${label} is computed, not stored: compile the model first",
                region.name
            )));
        };
        let name = region.tensor_name(name);
        let stored = self.source.info(&name).map(|i| i.stored);
        let of = match stored {
            Some(Stored::F32) => Float::F32,
            Some(Stored::F16) => Float::F16,
            Some(Stored::Bf16) => Float::Bf16,
            Some(Stored::F64 | Stored::U8 | Stored::I8 | Stored::I16 | Stored::I32 | Stored::I64) | None => {
                return Err(CudaError::Unsupported(format!("tensor `{name}` is not stored as f32, f16 or bf16")));
            }
        };
        Ok((name, of))
    }
}

fn covered(region: &Region, quant: Quant, rows: usize, cols: usize) -> Result<Tiles, CudaError> {
    mma16::shape(quant, rows, cols).map_err(|e| {
        CudaError::Unsupported(format!("region {}: no kernel covers {quant}[{rows},{cols}]: {}", region.name, e.0))
    })
}

/// Whether kernels cover a module whose linears will be quantized like this, as far as can be told beforehand.
///
/// # Errors
/// The first op or weight that none covers.
pub fn check(module: &Module, quant: Quant) -> Result<(), CudaError> {
    for region in module.eye_and_text().1 {
        let mut region = region.clone();
        inline_fused(&mut region, &module.fused)
            .map_err(|e| CudaError::Unsupported(format!("region {}: {e}", region.name)))?;
        for (_, node) in region.nodes() {
            let unsupported =
                |why: &str| CudaError::Unsupported(format!("region {}: {}: {why}", region.name, node.op.mnemonic()));
            if let Some(why) = without_kernels(&node.op) {
                return Err(unsupported(why));
            }
            let ty = |at: usize| node.operands.get(at).map(|o| region.operand_type(*o));
            if let Op::Linear(_) = &node.op
                && let Some((rows, cols)) = ty(1).and_then(Type::matrix)
            {
                covered(&region, quant, rows, cols)?;
            }
            if let Op::TopK(op) = &node.op {
                let experts = ty(0).and_then(Type::channels).and_then(|c| usize::try_from(c).ok()).unwrap_or(0);
                Choice::of(op, experts).map_err(|e| unsupported(&e))?;
            }
            if let Op::Sdpa(op) = &node.op {
                let columns = |at: usize, heads: u64| {
                    ty(at).and_then(|t| t.channels()).map_or(0, |c| (c / heads.max(1)) as usize)
                };
                Shape::of(op, columns(0, op.heads), columns(2, op.kv_heads), true, 1)
                    .map_err(|e| CudaError::Unsupported(format!("region {}: {e}", region.name)))?;
            }
        }
    }
    Ok(())
}
