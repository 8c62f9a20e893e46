//! A module as JSON, for machines: the same facts as the text, taken apart.

use serde_json::{Map, Value as Json, json as object};

use crate::module::Module;
use crate::region::{Region, RegionName};
use crate::text::tables;
use crate::ty::Elem;

/// The module as JSON. Names are those of the text; weights keep their term as text.
///
/// `{name, dtype, header, dims, fused: [region], regions: [region]}`, where a region is `{name, layer, prefix, params,
/// data, weights, nodes, results}`.
pub fn json(module: &Module) -> Json {
    object!({
        "name": &*module.name,
        "dtype": module.dtype.to_string(),
        "header": module.header,
        "dims": module.dims.iter().map(|d| &**d).collect::<Vec<_>>(),
        "fused": module.fused.iter().map(|d| with_name(region(&d.body, module.dtype), &d.name)).collect::<Vec<_>>(),
        "regions": module.regions.iter().map(|r| region(r, module.dtype)).collect::<Vec<_>>(),
    })
}

/// A definition goes by its own name, whatever its body is called.
fn with_name(mut region: Json, name: &str) -> Json {
    if let Json::Object(map) = &mut region {
        map.insert("name".into(), name.into());
    }
    region
}

fn region(region: &Region, dtype: Elem) -> Json {
    let tables = tables(region, dtype);
    let (name, layer) = match &region.name {
        RegionName::Named(name) => (name.to_string(), Json::Null),
        RegionName::Layer(i) => (i.to_string(), (*i).into()),
    };
    let params = region
        .params()
        .iter()
        .map(|p| object!({"name": tables.operand(*p), "type": region.operand_type(*p).to_string()}));
    let definition = |d: &crate::text::Definition| object!({"name": d.name, "is": d.is, "type": d.ty});
    let nodes = region.nodes().map(|(_, node)| {
        let results =
            node.results.iter().map(|r| object!({"name": tables.value(*r), "type": region.value(*r).ty.to_string()}));
        let mut map = Map::new();
        map.insert("op".into(), node.op.mnemonic().into());
        map.insert("attributes".into(), Json::Object(node.op.attributes()));
        map.insert("operands".into(), node.operands.iter().map(|o| Json::from(tables.operand(*o))).collect());
        map.insert("results".into(), results.collect());
        Json::Object(map)
    });
    object!({
        "name": name,
        "layer": layer,
        "prefix": &*region.prefix,
        "params": params.collect::<Vec<_>>(),
        "data": tables.data.iter().map(definition).collect::<Vec<_>>(),
        "weights": tables.weights.iter().map(definition).collect::<Vec<_>>(),
        "nodes": nodes.collect::<Vec<_>>(),
        "results": region.results().iter().map(|r| tables.value(*r)).collect::<Vec<_>>(),
    })
}
