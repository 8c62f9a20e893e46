//! Binding of run-time shapes to a region's parameter types.

use std::collections::BTreeMap;

use awqc_ir::{Dim, Name, Region};
use awqc_passes::ExecError;

/// The sizes of the symbolic dimensions when `region` gets inputs of these shapes.
///
/// # Errors
/// When the number of inputs, a rank, a constant axis or two uses of one symbol do not agree.
pub fn bind(region: &Region, shapes: &[Vec<usize>]) -> Result<BTreeMap<Name, usize>, ExecError> {
    let params: Vec<_> = region.value_params().collect();
    if params.len() != shapes.len() {
        return Err(ExecError::Tensor(format!(
            "region {} takes {} inputs, {} are given",
            region.name,
            params.len(),
            shapes.len()
        )));
    }
    let mut dims = BTreeMap::new();
    for (id, shape) in params.iter().zip(shapes) {
        let value = region.value(*id);
        let wrong = || {
            ExecError::Tensor(format!(
                "input %{} of region {} is {}, the given tensor has shape {shape:?}",
                value.name, region.name, value.ty
            ))
        };
        if value.ty.rank() != shape.len() {
            return Err(wrong());
        }
        for (dim, size) in value.ty.shape.iter().zip(shape) {
            let want = match dim {
                Dim::Const(n) => usize::try_from(*n).ok(),
                Dim::Sym(name) => Some(*dims.entry(name.clone()).or_insert(*size)),
            };
            if want != Some(*size) {
                return Err(wrong());
            }
        }
    }
    Ok(dims)
}

#[cfg(test)]
mod tests {
    use awqc_ir::{Elem, RegionName, Type};

    use super::*;

    #[test]
    fn symbols_are_bound_once() {
        let mut region = Region::new(RegionName::Named("r".into()), "");
        region.add_param("a", Type::new(Elem::F16, [Dim::Sym("S".into()), Dim::Const(3)]));
        region.add_param("b", Type::new(Elem::F16, [Dim::Sym("S".into())]));
        assert_eq!(bind(&region, &[vec![5, 3], vec![5]]).unwrap()[&Name::from("S")], 5);
        assert!(bind(&region, &[vec![5, 3], vec![4]]).is_err());
        assert!(bind(&region, &[vec![5, 2], vec![5]]).is_err());
        assert!(bind(&region, &[vec![5, 3]]).is_err());
        assert!(bind(&region, &[vec![3], vec![5]]).is_err());
    }
}
