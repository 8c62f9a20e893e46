//! The linears of a region whose weights can be quantized.

use awqc_ir::{NodeId, Op, Operand, Region, ValueId, WeightId};

/// One `linear` with a float weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearUse {
    /// The node.
    pub node: NodeId,
    /// What it reads: `[…, in]`.
    pub input: ValueId,
    /// Its weight: `[out, in]`, or `[E, out, in]`, float.
    pub weight: WeightId,
    /// Its result: `[…, out]`.
    pub output: ValueId,
}

/// The linears of a layer region with float weights that nothing but linears uses, in program order; none for other
/// regions. Routers and gates of one channel are left out. These are what `quantize` quantizes and what the searches
/// before it look at.
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
    // A gate of one channel weighs nothing, and decides about all.
    let gate = |l: &LinearUse| region.value(l.output).ty.channels() == Some(1);
    let all = linears(region).into_iter();
    all.filter(|l| !elsewhere.contains(&l.weight) && !gate(l) && !feeds_routing(region, l)).collect()
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

/// The quantizable linears that must get one width, in order: those that read one value, because they may be joined to
/// one product, and those that use one weight.
pub fn units(region: &Region) -> Vec<Vec<LinearUse>> {
    let linears = quantizable(region);
    let mut units: Vec<Vec<usize>> = Vec::new();
    for (i, l) in linears.iter().enumerate() {
        let alike = |other: &usize| linears[*other].input == l.input || linears[*other].weight == l.weight;
        let (meet, apart): (Vec<_>, Vec<_>) = units.into_iter().partition(|u| u.iter().any(alike));
        units = apart;
        let mut unit: Vec<usize> = meet.into_iter().flatten().chain([i]).collect();
        unit.sort_unstable();
        units.push(unit);
    }
    units.sort_unstable();
    units.into_iter().map(|u| u.into_iter().map(|i| linears[i]).collect()).collect()
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
    feeds(region, linear.output, |op, i| matches!(op, Op::Sdpa(_) | Op::CrossSdpa(_)) && i < 2)
}

/// Whether the result of a linear decides which experts a token goes to. Such a linear is small, and what rounding does
/// to a choice no squared error shows.
pub fn feeds_routing(region: &Region, linear: &LinearUse) -> bool {
    feeds(region, linear.output, |op, _| matches!(op, Op::TopK(_)))
}

/// Whether `value` reaches an operand that `ends` names, by way of ops that keep its channels apart.
fn feeds(region: &Region, value: ValueId, ends: impl Fn(&Op, usize) -> bool) -> bool {
    let mut reached = vec![value];
    for (_, node) in region.nodes() {
        let mut reads = node.operands.iter().enumerate();
        let mut reads = reads.by_ref().filter(|(_, o)| o.value().is_some_and(|v| reached.contains(&v))).peekable();
        if reads.peek().is_none() {
            continue;
        }
        if reads.any(|(i, _)| ends(&node.op, i)) {
            return true;
        }
        // A split result carries the scores' channels or the values'; either way the linear feeds the scores.
        let keeps = matches!(
            node.op,
            Op::Rope(_)
                | Op::RmsNorm(_)
                | Op::LayerNorm(_)
                | Op::Split(_)
                | Op::Concat(_)
                | Op::Repeat(_)
                | Op::Merge(_)
                | Op::Append(_)
                | Op::Cut(_)
                | Op::Gate(_)
                | Op::Scale(_)
                | Op::Clamp(_)
                | Op::Softcap(_)
                | Op::Sigmoid(_)
                | Op::Softmax(_)
        );
        if keeps {
            reached.extend(&node.results);
        }
    }
    false
}
