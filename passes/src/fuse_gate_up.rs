//! Joins the two linears of a gated feed-forward block.

use awqc_ir::{Def, NodeId, Op, Region, ValueId};

use crate::pass::{Changed, Fidelity, Pass, PassCx, PassError};
use crate::rewrite::parallel_linear;

/// See [`Pass::DOC`].
#[derive(Clone, Copy, Debug)]
pub struct FuseGateUp;

impl Pass for FuseGateUp {
    const NAME: &'static str = "fuse-gate-up";
    const DOC: &'static str = "\
Joins the two linears whose outputs meet in a product, one of them possibly through an activation, into one linear and
a `split`. The activated one comes first.

# Before
```text
%g = linear %h, $g
%u = linear %h, $u
%s = silu %g
%m = mul %s, %u
```
# After
```text
$gu    = cat.0($g, $u)
%gu    = linear %h, $gu
%g, %u = split %gu {sizes=[96, 96]}
%s     = silu %g
%m     = mul %s, %u
```
# Legal when
Both read the same value, their weights have the same element type, and both or none have a bias. Rows are quantized
independently, so `cat.0(quant(a), quant(b))` becomes `quant(cat.0(a, b))`.
# Fidelity
Exact.
# Options
None.
# Reference
GLU variants: arXiv 2002.05202.
";
    type Options = ();

    fn fidelity() -> Fidelity {
        Fidelity::Exact
    }

    fn new((): ()) -> Result<Self, PassError> {
        Ok(Self)
    }

    fn run(&self, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
        let products: Vec<NodeId> =
            region.nodes().filter(|(_, n)| matches!(n.op, Op::Mul(_))).map(|(id, _)| id).collect();
        let mut changed = Changed::No;
        for id in products {
            let sides: Vec<Side> = region.node(id).operands.iter().filter_map(|o| side(region, o.value()?)).collect();
            let linears = match sides.as_slice() {
                [Side::Plain(up), Side::Activated(gate)] => [*gate, *up],
                [Side::Activated(a) | Side::Plain(a), Side::Activated(b) | Side::Plain(b)] => [*a, *b],
                _ => continue,
            };
            if parallel_linear::join(region, cx, &linears, "gu") {
                changed = Changed::Yes;
            }
        }
        Ok(changed)
    }
}

/// The linear behind one side of a product.
enum Side {
    /// Directly.
    Plain(NodeId),
    /// Through an activation.
    Activated(NodeId),
}

fn side(region: &Region, value: ValueId) -> Option<Side> {
    let Def::Result(id, _) = region.value(value).def else { return None };
    let node = region.node(id);
    if matches!(node.op, Op::Linear(_)) {
        return Some(Side::Plain(id));
    }
    if !matches!(node.op, Op::Silu(_) | Op::Gelu(_) | Op::Relu(_)) {
        return None;
    }
    match side(region, node.operands.first()?.value()?)? {
        Side::Plain(linear) => Some(Side::Activated(linear)),
        // Two activations in a row are not a gate.
        Side::Activated(_) => None,
    }
}
