//! From "the complete new object" to the JSON Patch (RFC 6902) that leads there.
//!
//! Both documents may be hostile: the new one comes from an untrusted policy, the old one
//! from whoever sent the request. What the `json_patch` crate's diff costs on such input:
//!
//! - It recurses once per level; [`StrictText`] keeps that to 127.
//! - It compares arrays index by index and objects key by key, so the number of operations is
//!   linear in the size of both documents. There is no quadratic alignment.
//! - It copies the whole path into every operation. One key of a megabyte above a hundred
//!   thousand changed numbers would take a hundred gigabytes.
//! - It needs both documents as trees, at 32 bytes or more for a value that may be two bytes
//!   of text: 8 MiB of it would become 128.
//!
//! Hence two bounds: on the values in a tree, and on the operations and path bytes of the
//! patch. Beyond them the patch is a single `replace` of the whole document, which leads to
//! the same object, is no longer than the new object itself, and needs no tree.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use super::strict_json::StrictText;

/// Values in both documents together for which trees are built. A value costs 32 bytes, and
/// alone in a map of its own over 600, so the trees stay below 50 MiB plus the strings in
/// them. An object of the 1.5 MiB that etcd stores has well under a hundred thousand values,
/// and rarely half of that.
const TREE_VALUES_MAX: usize = 1 << 17;

/// Operations in one patch: what the Kubernetes API server itself accepts in a client's JSON
/// Patch. Applying can be quadratic (each `remove` in an array moves the tail).
const PATCH_OPERATIONS_MAX: usize = 10_000;

/// Bytes of all paths in one patch together; four hundred for each of the operations.
const PATCH_PATH_BYTES_MAX: usize = 4 << 20;

/// The patch from `old` to `new` in standard, padded base64; `None` if they are equal.
///
/// Equality is that of the values: whitespace, key order and the spelling of a number are no
/// difference. Integers beyond 64 bits are compared as the `f64` nearest to them.
pub(crate) fn between(old: StrictText<'_>, new: StrictText<'_>) -> Option<String> {
    // The usual mutating policy changes nothing for most objects and echoes what it got.
    if old.text() == new.text() {
        return None;
    }
    let patch = match by_operations(old, new) {
        Difference::None => return None,
        Difference::Patch(patch) => patch,
        Difference::Unbounded => replace_document(new),
    };
    Some(STANDARD.encode(patch))
}

enum Difference {
    None,
    /// The patch as JSON text.
    Patch(Vec<u8>),
    /// Finding or writing it out would exceed a bound.
    Unbounded,
}

fn by_operations(old: StrictText<'_>, new: StrictText<'_>) -> Difference {
    if old.values().saturating_add(new.values()) > TREE_VALUES_MAX {
        return Difference::Unbounded;
    }
    // Neither this nor the serialisation below is known to fail for a checked text; replacing
    // the document is the right answer even so.
    let (Ok(old), Ok(new)) = (old.tree(), new.tree()) else {
        return Difference::Unbounded;
    };
    let mut budget = Budget { operations: PATCH_OPERATIONS_MAX, path_bytes: PATCH_PATH_BYTES_MAX };
    if budget.cover(&old, &new, 0).is_none() {
        return Difference::Unbounded;
    }
    let patch = json_patch::diff(&old, &new);
    if patch.0.is_empty() {
        return Difference::None;
    }
    serde_json::to_vec(&patch).map_or(Difference::Unbounded, Difference::Patch)
}

/// Sets the whole document, verbatim.
fn replace_document(new: StrictText<'_>) -> Vec<u8> {
    format!(r#"[{{"op":"replace","path":"","value":{}}}]"#, new.text()).into_bytes()
}

/// What a patch may still cost.
struct Budget {
    operations: usize,
    path_bytes: usize,
}

impl Budget {
    /// Pays for the operations that `json_patch::diff` would write for these two values, at
    /// a path of `path_bytes`; takes the diff's own way through them, without its copies.
    /// `None` once the budget is spent.
    fn cover(&mut self, old: &Value, new: &Value, path_bytes: usize) -> Option<()> {
        match (old, new) {
            (Value::Object(old), Value::Object(new)) => {
                for (key, new) in new {
                    let inner = deeper(path_bytes, key.len());
                    match old.get(key) {
                        Some(old) => self.cover(old, new, inner)?,
                        None => self.operation(inner)?,
                    }
                }
                for key in old.keys().filter(|key| !new.contains_key(*key)) {
                    self.operation(deeper(path_bytes, key.len()))?;
                }
            }
            (Value::Array(old), Value::Array(new)) => {
                let inner = deeper(path_bytes, INDEX_DIGITS_MAX);
                for (old, new) in old.iter().zip(new) {
                    self.cover(old, new, inner)?;
                }
                for _ in 0..old.len().abs_diff(new.len()) {
                    self.operation(inner)?;
                }
            }
            _ if old == new => {}
            _ => self.operation(path_bytes)?,
        }
        Some(())
    }

    fn operation(&mut self, path_bytes: usize) -> Option<()> {
        self.operations = self.operations.checked_sub(1)?;
        self.path_bytes = self.path_bytes.checked_sub(path_bytes)?;
        Some(())
    }
}

/// Digits of an array index, given [`TREE_VALUES_MAX`].
const INDEX_DIGITS_MAX: usize = 6;

/// The length of a path one step further down; `~` and `/` in a key take two bytes each.
fn deeper(path_bytes: usize, key_bytes: usize) -> usize {
    path_bytes.saturating_add(1).saturating_add(key_bytes.saturating_mul(2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use serde_json::value::RawValue;

    fn strict(text: &str) -> StrictText<'_> {
        StrictText::check(serde_json::from_str::<&RawValue>(text).unwrap()).unwrap()
    }

    /// The operations as JSON, `None` for no patch.
    fn operations(old: &str, new: &str) -> Option<Value> {
        let patch = between(strict(old), strict(new))?;
        Some(serde_json::from_slice(&STANDARD.decode(patch).unwrap()).unwrap())
    }

    fn patched(old: &str, new: &str) -> Value {
        let mut document: Value = serde_json::from_str(old).unwrap();
        if let Some(operations) = operations(old, new) {
            let patch: json_patch::Patch = serde_json::from_value(operations).unwrap();
            json_patch::patch(&mut document, &patch).unwrap();
        }
        document
    }

    fn assert_leads_there(old: &str, new: &str) {
        let wanted: Value = serde_json::from_str(new).unwrap();
        assert_eq!(patched(old, new), wanted, "from {old} to {new}");
    }

    fn whole_document(new: &str) -> Option<Value> {
        let new: Value = serde_json::from_str(new).unwrap();
        Some(json!([{"op":"replace","path":"","value":new}]))
    }

    #[test]
    fn an_echo_is_no_patch() {
        assert!(operations(r#"{"a":1}"#, r#"{"a":1}"#).is_none());
    }

    #[test]
    fn another_spelling_of_the_same_object_is_no_patch() {
        let old = r#"{"a":1,"b":[true,"é"]}"#;
        let new = " {\"b\" : [true, \"\\u00e9\"],\n\"a\":1} ";
        assert!(operations(old, new).is_none());
    }

    #[test]
    fn a_change_is_a_small_patch() {
        assert_eq!(
            operations(
                r#"{"metadata":{"name":"x"},"spec":{"a":[1,2]}}"#,
                r#"{"metadata":{"name":"x","labels":{"b":"c"}},"spec":{"a":[1]}}"#,
            ),
            Some(json!([
                {"op":"add","path":"/metadata/labels","value":{"b":"c"}},
                {"op":"remove","path":"/spec/a/1"},
            ]))
        );
    }

    #[test]
    fn the_encoding_is_padded_standard_base64_of_compact_json() {
        assert_eq!(
            between(strict(r#"{"a":1}"#), strict(r#"{"a":22}"#)).unwrap(),
            STANDARD.encode(r#"[{"op":"replace","path":"/a","value":22}]"#)
        );
    }

    #[test]
    fn a_number_of_many_digits_is_not_its_neighbour() {
        // The nearest 64-bit float is written so; a fast reading of that is another one.
        let number = "4.0777777777013707e21";
        let patch = between(strict("{}"), strict(&format!(r#"{{"n":{number}}}"#))).unwrap();
        let patch = String::from_utf8(STANDARD.decode(patch).unwrap()).unwrap();
        let written = patch.split("\"value\":").nth(1).unwrap().trim_end_matches("}]");
        assert_eq!(written.replace('+', ""), number);
        assert_leads_there("{}", r#"{"n":4077777777701370645551,"m":[77777.77777773,5e-324]}"#);
    }

    #[test]
    fn keys_with_pointer_syntax_are_escaped() {
        assert_leads_there(r#"{"a/b~c":1,"":2,"~1":3}"#, r#"{"a/b~c":2,"":[],"~0":3}"#);
    }

    #[test]
    fn a_document_of_another_type_is_replaced() {
        assert_eq!(operations("[1]", "{}"), whole_document("{}"));
        assert_eq!(operations("1", "null"), whole_document("null"));
    }

    #[test]
    fn the_private_key_of_the_json_library_survives() {
        // Compared as text: reading the patch back as a `Value` is what would go wrong.
        let new = r#"{"a":{"$serde_json::private::RawValue":"[1]"}}"#;
        let patch = between(strict(r#"{"a":0}"#), strict(new)).unwrap();
        assert_eq!(
            String::from_utf8(STANDARD.decode(patch).unwrap()).unwrap(),
            r#"[{"op":"replace","path":"/a","value":{"$serde_json::private::RawValue":"[1]"}}]"#
        );
    }

    #[test]
    fn too_many_operations_become_one() {
        let list = |from: usize, count: usize| {
            let numbers: Vec<String> = (from..from + count).map(|n| n.to_string()).collect();
            format!("[{}]", numbers.join(","))
        };
        let most = operations(&list(0, PATCH_OPERATIONS_MAX), &list(1, PATCH_OPERATIONS_MAX));
        assert_eq!(most.unwrap().as_array().unwrap().len(), PATCH_OPERATIONS_MAX);
        let new = list(1, PATCH_OPERATIONS_MAX + 1);
        assert_eq!(operations(&list(0, PATCH_OPERATIONS_MAX + 1), &new), whole_document(&new));
        // Removals and additions count as well.
        let long = list(0, 2 * PATCH_OPERATIONS_MAX);
        assert_eq!(operations(&long, "[]"), whole_document("[]"));
        assert_eq!(operations("[]", &long), whole_document(&long));
    }

    #[test]
    fn long_paths_are_not_copied_without_bound() {
        let nested = |value: usize| {
            let key = "k".repeat(1 << 20);
            let members: Vec<String> = (0..1_000).map(|n| format!(r#""{n}":{value}"#)).collect();
            format!(r#"{{"{key}":{{{}}}}}"#, members.join(","))
        };
        let new = nested(2);
        assert_eq!(operations(&nested(1), &new), whole_document(&new));
    }

    #[test]
    fn a_document_of_very_many_values_is_not_built() {
        let new = format!("[{}0]", "0,".repeat(4 << 20));
        let patch = between(strict("[]"), strict(&new)).unwrap();
        let text = String::from_utf8(STANDARD.decode(patch).unwrap()).unwrap();
        assert_eq!(text, format!(r#"[{{"op":"replace","path":"","value":{new}}}]"#));
    }

    /// A small deterministic generator (xorshift), so that a failure can be repeated.
    struct Generator(u64);

    impl Generator {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % bound
        }

        fn key(&mut self) -> &'static str {
            let keys = ["a", "b", "c", "", "a/b", "~", "~1", "0", "é", "-"];
            keys[usize::try_from(self.below(10)).unwrap()]
        }

        fn value(&mut self, depth: u64) -> Value {
            match self.below(if depth == 0 { 6 } else { 10 }) {
                0 => Value::Null,
                1 => json!(self.below(2) == 0),
                2 => json!(self.below(4)),
                3 => json!(-1.5),
                4 => json!(u64::MAX),
                5 => json!(self.key()),
                6 | 7 => (0..self.below(5)).map(|_| self.value(depth - 1)).collect(),
                _ => (0..self.below(6))
                    .map(|_| (self.key().to_owned(), self.value(depth - 1)))
                    .collect(),
            }
        }

        /// Something near `value`, as a mutating policy would return.
        fn mutated(&mut self, value: &Value) -> Value {
            if self.below(8) == 0 {
                return self.value(2);
            }
            match value {
                Value::Array(elements) => {
                    let keep = usize::try_from(self.below(6)).unwrap();
                    elements.iter().take(keep).map(|v| self.mutated(v)).collect()
                }
                Value::Object(members) => {
                    let mut members: serde_json::Map<String, Value> =
                        members.iter().map(|(key, v)| (key.clone(), self.mutated(v))).collect();
                    members.retain(|_, _| self.below(5) != 0);
                    if self.below(3) == 0 {
                        members.insert(self.key().to_owned(), self.value(1));
                    }
                    Value::Object(members)
                }
                Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.clone(),
            }
        }
    }

    #[test]
    fn the_patch_always_leads_from_the_old_to_the_new_object() {
        let mut generator = Generator(0x9e37_79b9_7f4a_7c15);
        for _ in 0..5_000 {
            let old = generator.value(4);
            let new =
                if generator.below(4) == 0 { generator.value(4) } else { generator.mutated(&old) };
            assert_leads_there(&old.to_string(), &new.to_string());
        }
    }

    #[test]
    fn the_budget_covers_what_the_diff_writes() {
        let mut generator = Generator(42);
        for _ in 0..5_000 {
            let old = generator.value(4);
            let new = generator.mutated(&old);
            let patch = json_patch::diff(&old, &new);
            let mut budget =
                Budget { operations: PATCH_OPERATIONS_MAX, path_bytes: PATCH_PATH_BYTES_MAX };
            budget.cover(&old, &new, 0).unwrap();
            let path_bytes: usize = patch.0.iter().map(|op| op.path().len()).sum();
            assert_eq!(PATCH_OPERATIONS_MAX - budget.operations, patch.0.len());
            assert!(PATCH_PATH_BYTES_MAX - budget.path_bytes >= path_bytes);
        }
    }
}
