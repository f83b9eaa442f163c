//! The texts of prompts, with places for values.

/// Fills `{name}` in a template with the values. Braces in values stay as they are.
pub(super) fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let mut text = String::new();
    let mut rest = template;
    while let Some(start) = rest.find('{') {
        let (before, from) = rest.split_at(start);
        text.push_str(before);
        let name = from.find('}').map(|end| &from[1..end]);
        let value =
            name.and_then(|name| values.iter().find(|(known, _)| *known == name).map(|(_, value)| (name, value)));
        match value {
            Some((name, value)) => {
                text.push_str(value);
                rest = &from[name.len() + 2..];
            }
            None => {
                text.push('{');
                rest = &from[1..];
            }
        }
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::fill;

    #[test]
    fn values_are_filled_in_once() {
        assert_eq!(fill("a {x} {y} {\"z\": {x}}", &[("x", "{y}"), ("y", "2")]), "a {y} 2 {\"z\": {y}}");
        assert_eq!(fill("{", &[]), "{");
        assert_eq!(fill("}{x", &[("x", "1")]), "}{x");
    }
}
