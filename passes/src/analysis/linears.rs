//! The linears of a region whose weights can be quantized.

use awqc_ir::{NodeId, Op, Operand, Region, ValueId, WeightId};

/// One `linear` with a float weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearUse {
    /// The node.
    pub node: NodeId,
    /// What it reads: `[…, in]`.
    pub input: ValueId,
    /// Its weight: `[out, in]`, float.
    pub weight: WeightId,
    /// Its result: `[…, out]`.
    pub output: ValueId,
}

/// The linears of a layer region with float weights that nothing but linears uses, in program order; none for other
/// regions. These are what `quantize` quantizes and what the searches before it look at.
pub fn quantizable(region: &Region) -> Vec<LinearUse> {
    if !region.name.is_layer() {
        return Vec::new();
    }
    let elsewhere: Vec<WeightId> = region
        .nodes()
        .flat_map(|(_, n)| {
            let linear = matches!(n.op, Op::Linear(_));
            n.operands.iter().enumerate().filter(move |(i, _)| !(linear && *i == 1)).filter_map(|(_, o)| o.weight())
        })
        .collect();
    linears(region).into_iter().filter(|l| !elsewhere.contains(&l.weight)).collect()
}

/// Every `linear` with a float weight, in program order.
pub fn linears(region: &Region) -> Vec<LinearUse> {
    region
        .nodes()
        .filter_map(|(node, n)| match (&n.op, n.operands.as_slice(), n.results.as_slice()) {
            (Op::Linear(_), [Operand::Value(input), Operand::Weight(weight), ..], [output]) => {
                let float = region.weight(*weight).ty.elem.is_float();
                float.then_some(LinearUse { node, input: *input, weight: *weight, output: *output })
            }
            _ => None,
        })
        .collect()
}

/// The distinct weights of `linears`, in order.
pub fn weights(linears: &[LinearUse]) -> Vec<WeightId> {
    let mut out = Vec::new();
    for l in linears {
        if !out.contains(&l.weight) {
            out.push(l.weight);
        }
    }
    out
}

/// What people call a weight: its name, or the tensors that it is made of.
pub fn label(region: &Region, weight: WeightId) -> String {
    match &region.weight(weight).name {
        Some(name) => name.to_string(),
        None => region.sources(weight).join("+"),
    }
}

/// Whether the result of a linear ends up in the queries or keys of an attention, by way of nothing but rotations,
/// norms and cuts. Such errors pass through a softmax, which a squared error of the linear's output does not see.
pub fn feeds_attention_scores(region: &Region, linear: &LinearUse) -> bool {
    let mut reached = vec![linear.output];
    for (_, node) in region.nodes() {
        let reads = |i: usize| node.operands.get(i).and_then(|o| o.value()).is_some_and(|v| reached.contains(&v));
        match &node.op {
            Op::Sdpa(_) if reads(0) || reads(1) => return true,
            // A split result carries the scores' channels or the values'; either way the linear feeds the scores.
            Op::Rope(_) | Op::RmsNorm(_) | Op::LayerNorm(_) | Op::Split(_) | Op::Concat(_) | Op::Scale(_)
                if (0..node.operands.len()).any(reads) =>
            {
                reached.extend(&node.results);
            }
            Op::Rope(_)
            | Op::RmsNorm(_)
            | Op::LayerNorm(_)
            | Op::Split(_)
            | Op::Concat(_)
            | Op::Scale(_)
            | Op::Sdpa(_)
            | Op::Embedding(_)
            | Op::Linear(_)
            | Op::RopeTable(_)
            | Op::Silu(_)
            | Op::Gelu(_)
            | Op::Relu(_)
            | Op::Add(_)
            | Op::Mul(_)
            | Op::Softcap(_)
            | Op::Fused(_) => {}
        }
    }
    false
}
