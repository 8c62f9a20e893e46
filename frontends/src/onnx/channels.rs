//! Channels cut out and joined, those of each head by themselves.

use awqc_ir::op::Concat;
use awqc_ir::{Operand, Type};
use serde_json::{Value as Json, json};

use super::evaluate::int;
use super::import::{Form, Importer, Thing, Val};
use super::numbers::{axis, picked};
use super::proto::Node;
use super::values::{Made, one};
use super::view::{From, View, channels};
use crate::error::ImportError;

impl Importer<'_> {
    /// Entries of an axis.
    pub(super) fn slice(
        &mut self,
        node: &Node,
        x: &Val,
        at: usize,
        ends: [(i64, i64); 2],
        step: i64,
    ) -> Result<Val, ImportError> {
        let len = [0, 1].map(|i| x.view.shape(i).get(at).copied().unwrap_or(0) as i64);
        let picks = [0, 1].map(|i| picked(len[i], ends[i].0, ends[i].1, step));
        let [Ok(a), Ok(b)] = picks else { return self.refuse(node, "a slice that picks nothing known") };
        let all = |p: &[i64], len: i64| p.iter().copied().eq(0..len);
        if all(&a, len[0]) && all(&b, len[1]) {
            return Ok(x.clone());
        }
        let (Some((n, stride)), Some(start), true) =
            (x.view.run(at), a.first().copied(), a == b && step == 1 && x.form == Form::Rows)
        else {
            return self.refuse(node, format!("a slice of axis {at} of {:?} (batch 2, 24 positions)", x.view.shape(0)));
        };
        let (run, size, start) = (n * stride, a.len() * stride, start as usize * stride);
        let heads = x.channels / run;
        let channels = heads * size;
        let attributes = json!({"heads": heads, "start": start, "size": size});
        let Json::Object(attributes) = attributes else { return self.refuse(node, "no attributes") };
        let ty: Type = self.ty(Form::Rows, channels);
        let id = self.foreign(node, "Slice", vec![Operand::Value(x.id)], attributes, ty)?;
        // Channels further out than the cut run come closer together.
        let mut view = x.view.clone();
        for f in view.0.iter_mut().flatten() {
            if let From::Channel(s) = &mut f.from
                && *s >= run
            {
                *s = *s / run * size;
            }
        }
        if let Some(axis) = view.0.get_mut(at) {
            *axis = if a.len() == 1 { Vec::new() } else { vec![self::channels(a.len(), stride)] };
        }
        Ok(Val { id, channels, view, ..x.clone() })
    }

    /// Channels, or those of each head, joined.
    pub(super) fn concat(&mut self, node: &Node, inputs: &[Option<Thing>]) -> Made {
        let values = inputs.iter().map(|t| match t {
            Some(Thing::Value(v)) if v.form == Form::Rows => Some(v.clone()),
            Some(_) | None => None,
        });
        let Some(values) = values.collect::<Option<Vec<Val>>>() else {
            return self.refuse(node, "not all of the parts depend on the tokens");
        };
        let Some(first) = values.first().cloned() else { return self.refuse(node, "nothing is joined") };
        let rank = first.view.0.len();
        let last = axis(int(node, "axis").unwrap_or(-1), rank).is_ok_and(|a| a + 1 == rank);
        let runs: Option<Vec<usize>> = values
            .iter()
            .map(|v| v.view.run(v.view.0.len().saturating_sub(1)).filter(|r| r.1 == 1).map(|r| r.0))
            .collect();
        let Some(runs) = runs.filter(|_| last) else { return self.refuse(node, "only channels can be joined") };
        let heads = first.channels / runs[0];
        let alike = |(v, n): (&Val, &usize)| {
            v.channels / n == heads
                && thin(&v.view, *n).0.split_last().map(|s| s.1.to_vec())
                    == thin(&first.view, runs[0]).0.split_last().map(|s| s.1.to_vec())
        };
        if !values.iter().zip(&runs).all(alike) {
            return self.refuse(node, "the parts differ in more than their channels");
        }
        let total: usize = runs.iter().sum();
        let operands = values.iter().map(|v| Operand::Value(v.id)).collect();
        let id = self.emit(node, Concat { heads: heads as u64 }, operands)?;
        let View(mut axes) = thin(&first.view, runs[0]);
        for f in axes.iter_mut().flatten() {
            if let From::Channel(s) = &mut f.from {
                *s *= total;
            }
        }
        if let Some(last) = axes.last_mut() {
            *last = vec![channels(total, 1)];
        }
        one(Val { id, channels: heads * total, view: View(axes), ..first })
    }
}

/// The view of one channel for each run of `n`.
pub(super) fn thin(view: &View, n: usize) -> View {
    let mut out = view.clone();
    for f in out.0.iter_mut().flatten() {
        if let From::Channel(s) = &mut f.from
            && *s >= n
        {
            *s /= n;
        }
    }
    out
}
