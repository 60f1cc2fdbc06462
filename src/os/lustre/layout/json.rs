//! Layouts in the words of `lfs getstripe -y`.

use super::{ALL_OSTS, Component, FLAG_EXTENSION, FLAG_INIT, FLAG_STALE, Layout, Object};
use serde_json::{Value, json};

/// Flags as lfs names and orders them.
const FLAGS: [(u32, &str); 7] = [
    (FLAG_INIT, "init"),
    (FLAG_STALE, "stale"),
    (0x2, "prefrd"),
    (0x4, "prefwr"),
    (0x8, "offline"),
    (0x20, "nosync"),
    (FLAG_EXTENSION, "extension"),
];

impl Layout {
    /// The layout as `lfs getstripe -y` prints it.
    pub fn to_json(&self) -> Value {
        match self.components.first() {
            Some(component) if !self.composite => component.striping(self.generation),
            _ => json!({
                "lcm_layout_gen": self.generation,
                "lcm_mirror_count": self.mirrors,
                "lcm_entry_count": self.components.len(),
                "components": self.components.iter().map(Component::to_json).collect::<Vec<_>>(),
            }),
        }
    }
}

impl Component {
    fn to_json(&self) -> Value {
        let end = if self.end_bytes == u64::MAX { json!("EOF") } else { json!(self.end_bytes) };
        json!({
            "lcme_id": self.id,
            "lcme_mirror_id": self.mirror,
            "lcme_flags": flags(self.flags),
            "lcme_extent.e_start": self.start_bytes,
            "lcme_extent.e_end": end,
            "sub_layout": self.striping(0),
        })
    }

    fn striping(&self, generation: u32) -> Value {
        let count = if self.stripe_count == ALL_OSTS { -1 } else { i64::from(self.stripe_count) };
        let mut json = json!({
            "lmm_stripe_count": count,
            "lmm_stripe_size": self.stripe_size_bytes,
            "lmm_pattern": self.pattern.to_string(),
            "lmm_layout_gen": generation,
            "lmm_stripe_offset": self.objects.first().map_or(-1, |object| i64::from(object.ost_idx)),
        });
        if let Some(pool) = &self.pool {
            json["lmm_pool"] = json!(pool);
        }
        if !self.objects.is_empty() {
            json["lmm_objects"] = self.objects.iter().map(|object| object.to_json()).collect();
        }
        json
    }
}

impl Object {
    fn to_json(self) -> Value {
        let fid = self.fid;
        json!({"l_ost_idx": self.ost_idx, "l_fid": format!("{:#x}:{:#x}:{:#x}", fid.seq, fid.oid, fid.ver)})
    }
}

/// The flags' names, what has none as a number, 0 for no flags.
fn flags(mut flags: u32) -> Value {
    if flags == 0 {
        return json!(0);
    }
    let mut words = Vec::new();
    for (flag, name) in FLAGS {
        if flags & flag != 0 {
            words.push(name.to_owned());
            flags &= !flag;
        }
    }
    if flags != 0 {
        words.push(format!("{flags:#x}"));
    }
    json!(words.join(","))
}
