//! What a machine's unit is called.

/// systemd's limit is 255 bytes.
const MAX: usize = 200;

/// `whimbrel-NAME.scope`. What a unit's name cannot have is written as systemd does, as `\x20`.
pub fn of(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b":_.-".contains(&byte);
    let mut unit = String::from("whimbrel-");
    for byte in name.bytes() {
        if plain(byte) {
            unit.push(byte.into());
        } else {
            unit.push_str(&format!("\\x{byte:02x}"));
        }
        if unit.len() > MAX {
            break;
        }
    }
    unit.push_str(".scope");
    unit
}

/// What it is called while an earlier process of a machine of this name still ends.
pub fn beside(name: &str, pid: u32) -> String {
    of(&format!("{name}-{pid}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_called_as_its_machine_is() {
        assert_eq!(of("web1"), "whimbrel-web1.scope");
        assert_eq!(of("db-1.a_b"), "whimbrel-db-1.a_b.scope");
        assert_eq!(of("Web 1\\x"), "whimbrel-Web\\x201\\x5cx.scope");
        assert_eq!(of("é"), "whimbrel-\\xc3\\xa9.scope");
        assert_eq!(beside("web1", 7), "whimbrel-web1-7.scope");
        assert!(of(&"é".repeat(64)).len() < 255);
    }
}
