//! Removes nodes whose results nothing uses.

use awqc_ir::{NodeId, Region, Uses};

use crate::pass::{Changed, Fidelity, Pass, PassCx, PassError};
use crate::remark::{RemarkKind, counted};

/// See [`Pass::DOC`].
#[derive(Clone, Copy, Debug)]
pub struct Dce;

impl Pass for Dce {
    const NAME: &'static str = "dce";
    const DOC: &'static str = "\
Removes nodes whose results nothing uses, and with them what only they used.

# Before
```text
%u = silu %x
%y = relu %x
return %y
```
# After
```text
%y = relu %x
return %y
```
# Legal when
No result of the node is an operand or a result of the region.
# Fidelity
Exact.
# Options
None.
# Reference
Dead code elimination; ops have no side effects.
";
    type Options = ();

    fn fidelity() -> Fidelity {
        Fidelity::Exact
    }

    fn new((): ()) -> Result<Self, PassError> {
        Ok(Self)
    }

    fn run(&self, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
        let uses = Uses::of(region);
        let mut dead: Vec<NodeId> = Vec::new();
        // Users come after what they use, so one walk from the end finds everything.
        for (id, node) in region.nodes().rev() {
            let live = |r: &awqc_ir::ValueId| {
                uses.is_result(*r) || uses.nodes(*r).iter().any(|(user, _)| !dead.contains(user))
            };
            if !node.results.iter().any(live) {
                dead.push(id);
            }
        }
        cx.remarks.count("removed", dead.len() as f64);
        dead.iter().for_each(|id| region.remove(*id));
        if dead.is_empty() {
            return Ok(Changed::No);
        }
        cx.remarks.push(RemarkKind::Applied, format!("{} removed that nothing uses", counted(dead.len() as u64, "op")));
        Ok(Changed::Yes)
    }
}
