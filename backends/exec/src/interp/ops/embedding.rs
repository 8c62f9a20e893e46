//! `embedding` in burn's primitives.

use awqc_ir::op::Embedding;
use burn_backend::tensor::{FloatTensor, IntTensor};
use burn_backend::{Backend, Shape, TensorMetadata, try_read_sync};

use super::dims;

/// The integers of a device tensor.
pub(crate) fn read_ints<B: Backend>(ids: IntTensor<B>) -> Result<Vec<i64>, String> {
    let data = try_read_sync(B::int_into_data(ids)).ok_or("the device cannot be read synchronously")?;
    Ok(data.map_err(|e| format!("reading from the device failed: {e}"))?.iter::<i64>().collect())
}

/// Checks that every index lies in the table.
pub(crate) fn check(op: &Embedding, ids: &[i64], rows: usize) -> Result<(), String> {
    let offset = i64::from(op.offset);
    let Some(bad) = ids.iter().find(|i| !(0..rows as i64).contains(&i.saturating_add(offset))) else { return Ok(()) };
    let plus = if offset == 0 { String::new() } else { format!(" + {offset}") };
    Err(format!(
        "index {bad}{plus} is outside of the table of {rows} rows: a token that the model does not know, or a position beyond its last"
    ))
}

/// See [`crate::interp::ExecBackend::op_embedding`]. Indices are read back to be checked: backends differ in what they
/// do with one that is out of range.
pub fn embed<B: Backend>(op: &Embedding, table: FloatTensor<B>, ids: IntTensor<B>) -> Result<FloatTensor<B>, String> {
    let shape = ids.shape().to_vec();
    let rows = dims::<B>(&table);
    check(op, &read_ints::<B>(ids.clone())?, rows.first().copied().unwrap_or(0))?;
    let flat = B::int_reshape(ids, Shape::from(vec![shape.iter().product::<usize>()]));
    let flat = B::int_add_scalar(flat, op.offset.into());
    let out = B::float_select(table, 0, flat);
    let full: Vec<usize> = shape.into_iter().chain(rows.get(1).copied()).collect();
    Ok(B::float_reshape(out, Shape::from(full)))
}
