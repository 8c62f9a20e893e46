//! Simplifies what other passes and front ends leave behind: ops and weight terms that do nothing.

use awqc_ir::{Dim, Operand, Region, WeightExpr, WeightId};

use crate::pass::{Changed, Fidelity, Pass, PassCx, PassError};
use crate::remark::{RemarkKind, counted};
use crate::rewrite;

/// The rules for ops; weight terms follow in this file.
pub const RULES: &str = r#"
rewrite "scale by one" {
  match   { %y = scale %x {by=1} }
  produce { %y = %x }
}
rewrite "split of one" {
  match   { %y = split %x }
  produce { %y = %x }
}
rewrite "concat of one" {
  match   { %y = concat %x }
  produce { %y = %x }
}
rewrite "relu of relu" {
  match   { %a = relu %x
            %y = relu %a }
  produce { %y = %a }
}
rewrite "split of concat, two" {
  match   { %c = concat %a, %b
            %x, %y = split %c }
  where   same_type(%a, %x), same_type(%b, %y), without(%c, heads), without(%x, heads)
  produce { %x = %a
            %y = %b }
}
rewrite "split of concat, three" {
  match   { %d = concat %a, %b, %c
            %x, %y, %z = split %d }
  where   same_type(%a, %x), same_type(%b, %y), same_type(%c, %z), without(%d, heads), without(%x, heads)
  produce { %x = %a
            %y = %b
            %z = %c }
}
rewrite "concat of split, two" {
  match   { %a, %b = split %x
            %y = concat %a, %b }
  where   without(%a, heads), without(%y, heads)
  produce { %y = %x }
}
rewrite "concat of split, three" {
  match   { %a, %b, %c = split %x
            %y = concat %a, %b, %c }
  where   without(%a, heads), without(%y, heads)
  produce { %y = %x }
}
"#;

/// See [`Pass::DOC`].
#[derive(Clone, Copy, Debug)]
pub struct Canonicalize;

impl Pass for Canonicalize {
    const NAME: &'static str = "canonicalize";
    const DOC: &'static str = "\
Removes ops and weight terms that do nothing.

# Before
```text
$w     = transpose(transpose(\"w\"))
%a, %b = split %x {sizes=[16, 32]}
%y     = concat %a, %b
%z     = scale %y {by=1}
%r     = linear %z, $w
```
# After
```text
$w = \"w\"
%r = linear %x, $w
```
Also: `split` and `concat` of one part, `split` of the `concat` of the same parts, `relu` twice; in weights `cat` of one,
`cat` of consecutive `rows`, `cat` within `cat`, all `rows`, `rows` of `rows`, `rows` within one part of a `cat`,
`offset` by 0.
# Legal when
The types at the cut are equal.
# Fidelity
Exact.
# Options
None.
# Reference
None.
";
    type Options = ();

    fn fidelity() -> Fidelity {
        Fidelity::Exact
    }

    fn new((): ()) -> Result<Self, PassError> {
        Ok(Self)
    }

    fn run(&self, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
        let mut changed = rewrite::run_text(RULES, region, cx)?;
        let mut terms = 0;
        while cx.budget.allows() && simplify_one(region) {
            cx.budget.spend();
            terms += 1;
        }
        if terms > 0 {
            cx.remarks.count("weight terms", terms as f64);
            cx.remarks.push(RemarkKind::Applied, format!("{} simplified", counted(terms, "weight term")));
            changed = Changed::Yes;
        }
        Ok(changed)
    }
}

/// What a weight term may be replaced by.
enum Simpler {
    /// Another weight.
    Same(WeightId),
    /// A smaller term.
    Term(WeightExpr),
}

/// Simplifies the first weight that can be, children before parents. Each step makes the term smaller, so this ends.
fn simplify_one(region: &mut Region) -> bool {
    for id in region.weight_closure(&region.used_weights()) {
        match simpler(region, id) {
            Some(Simpler::Same(inner)) if region.weight(inner).ty == region.weight(id).ty => {
                redirect(region, id, inner);
                return true;
            }
            Some(Simpler::Term(term)) => {
                let ty = region.weight(id).ty.clone();
                region.set_weight(id, term, ty);
                return true;
            }
            Some(Simpler::Same(_)) | None => {}
        }
    }
    false
}

fn rows_of(region: &Region, id: WeightId) -> Option<u64> {
    region.weight(id).ty.shape.first().and_then(Dim::as_const)
}

fn simpler(region: &Region, id: WeightId) -> Option<Simpler> {
    let expr = |id: WeightId| &region.weight(id).expr;
    match expr(id) {
        WeightExpr::Offset { of, by } if *by == 0.0 => Some(Simpler::Same(*of)),
        WeightExpr::Transpose(of) => match expr(*of) {
            WeightExpr::Transpose(inner) => Some(Simpler::Same(*inner)),
            WeightExpr::Source(_)
            | WeightExpr::Packed { .. }
            | WeightExpr::Param(_)
            | WeightExpr::Mul { .. }
            | WeightExpr::Div { .. }
            | WeightExpr::Offset { .. }
            | WeightExpr::Cat { .. }
            | WeightExpr::Stack(_)
            | WeightExpr::Rows { .. }
            | WeightExpr::Clip { .. }
            | WeightExpr::Codes { .. }
            | WeightExpr::Quant(_)
            | WeightExpr::Pack(_) => None,
        },
        WeightExpr::Rows { of, start, len } => rows(region, *of, *start, *len),
        WeightExpr::Cat { axis, parts } => cat(region, *axis, parts),
        WeightExpr::Source(_)
        | WeightExpr::Packed { .. }
        | WeightExpr::Param(_)
        | WeightExpr::Mul { .. }
        | WeightExpr::Div { .. }
        | WeightExpr::Offset { .. }
        | WeightExpr::Stack(_)
        | WeightExpr::Clip { .. }
        | WeightExpr::Codes { .. }
        | WeightExpr::Quant(_)
        | WeightExpr::Pack(_) => None,
    }
}

fn rows(region: &Region, of: WeightId, start: u64, len: u64) -> Option<Simpler> {
    if start == 0 && rows_of(region, of) == Some(len) {
        return Some(Simpler::Same(of));
    }
    match &region.weight(of).expr {
        WeightExpr::Rows { of, start: first, .. } => {
            Some(Simpler::Term(WeightExpr::Rows { of: *of, start: first.checked_add(start)?, len }))
        }
        WeightExpr::Cat { axis: 0, parts } => {
            let mut at = 0;
            for part in parts {
                let count = rows_of(region, *part)?;
                if start >= at && start.checked_add(len)? <= at.checked_add(count)? {
                    return Some(Simpler::Term(WeightExpr::Rows { of: *part, start: start - at, len }));
                }
                at += count;
            }
            None
        }
        WeightExpr::Source(_)
        | WeightExpr::Packed { .. }
        | WeightExpr::Param(_)
        | WeightExpr::Mul { .. }
        | WeightExpr::Div { .. }
        | WeightExpr::Offset { .. }
        | WeightExpr::Cat { .. }
        | WeightExpr::Stack(_)
        | WeightExpr::Transpose(_)
        | WeightExpr::Clip { .. }
        | WeightExpr::Codes { .. }
        | WeightExpr::Quant(_)
        | WeightExpr::Pack(_) => None,
    }
}

fn cat(region: &Region, axis: usize, parts: &[WeightId]) -> Option<Simpler> {
    if let [only] = parts {
        return Some(Simpler::Same(*only));
    }
    let mut flat = Vec::new();
    for part in parts {
        match &region.weight(*part).expr {
            WeightExpr::Cat { axis: inner, parts } if *inner == axis => flat.extend(parts),
            WeightExpr::Cat { .. }
            | WeightExpr::Stack(_)
            | WeightExpr::Source(_)
            | WeightExpr::Packed { .. }
            | WeightExpr::Param(_)
            | WeightExpr::Mul { .. }
            | WeightExpr::Div { .. }
            | WeightExpr::Offset { .. }
            | WeightExpr::Rows { .. }
            | WeightExpr::Transpose(_)
            | WeightExpr::Clip { .. }
            | WeightExpr::Codes { .. }
            | WeightExpr::Quant(_)
            | WeightExpr::Pack(_) => flat.push(*part),
        }
    }
    if flat.len() > parts.len() {
        return Some(Simpler::Term(WeightExpr::Cat { axis, parts: flat }));
    }
    // Consecutive rows of one weight, in order.
    let mut run: Option<(WeightId, u64, u64)> = None;
    for part in parts {
        let WeightExpr::Rows { of, start, len } = region.weight(*part).expr else { return None };
        run = Some(match run {
            None => (of, start, len),
            Some((whole, first, total)) if whole == of && first + total == start => {
                (of, first, total.checked_add(len)?)
            }
            Some(_) => return None,
        });
    }
    let (of, start, len) = run.filter(|_| axis == 0)?;
    Some(Simpler::Term(WeightExpr::Rows { of, start, len }))
}

/// Puts `inner` wherever `outer` is used. A name that would be lost goes to `inner`.
fn redirect(region: &mut Region, outer: WeightId, inner: WeightId) {
    for node in region.order().to_vec() {
        for i in 0..region.node(node).operands.len() {
            if region.node(node).operands.get(i) == Some(&Operand::Weight(outer)) {
                region.set_operand(node, i, Operand::Weight(inner));
            }
        }
    }
    for id in region.weight_ids() {
        let weight = region.weight(id);
        if weight.expr.children().contains(&outer) {
            let (expr, ty) = (weight.expr.map_children(|c| if c == outer { inner } else { c }), weight.ty.clone());
            region.set_weight(id, expr, ty);
        }
    }
    if region.weight(inner).name.is_none() {
        let name = region.weight(outer).name.clone();
        region.rename_weight(outer, None);
        region.rename_weight(inner, name);
    }
}
