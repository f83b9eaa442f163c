//! Where this machine's pip is told to look: environment first, then pip's configuration files.
//!
//! See <https://pip.pypa.io/en/stable/topics/configuration/>.

use std::path::{Path, PathBuf};

/// pip's `option` (`index-url`, `no-index`, `cert`, `proxy`), from `PIP_…` or from the first configuration file that names it.
pub fn option(option: &str) -> Option<String> {
    let variable = format!("PIP_{}", option.to_ascii_uppercase().replace('-', "_"));
    if let Some(value) = variable_value(&variable) {
        return Some(value);
    }
    files().iter().find_map(|file| in_file(file, option))
}

/// The value of an environment variable that is set and not empty.
pub fn variable_value(name: &str) -> Option<String> {
    std::env::var(name).ok().map(|value| value.trim().to_string()).filter(|value| !value.is_empty())
}

/// Whether a setting is a way to say yes.
pub fn is_true(value: &str) -> bool {
    ["1", "true", "yes", "on"].iter().any(|yes| value.eq_ignore_ascii_case(yes))
}

/// pip's configuration files, the one that wins first.
fn files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    if let Some(file) = variable_value("PIP_CONFIG_FILE") {
        // pip reads no file at all when it is pointed at the null device.
        if file == "/dev/null" || file.eq_ignore_ascii_case("nul") {
            return files;
        }
        files.push(PathBuf::from(file));
    }
    files.extend(variable_value("VIRTUAL_ENV").map(|venv| Path::new(&venv).join("pip.conf")));
    files.extend(variable_value("XDG_CONFIG_HOME").map(|config| Path::new(&config).join("pip/pip.conf")));
    files.extend(variable_value("APPDATA").map(|config| Path::new(&config).join("pip/pip.ini")));
    if let Some(home) = std::env::home_dir() {
        files.extend(
            ["Library/Application Support/pip/pip.conf", ".config/pip/pip.conf", ".pip/pip.conf"]
                .map(|file| home.join(file)),
        );
    }
    files.extend(["/etc/pip.conf", "/etc/xdg/pip/pip.conf"].map(PathBuf::from));
    files
}

fn in_file(file: &Path, option: &str) -> Option<String> {
    in_text(&std::fs::read_to_string(file).ok()?, option)
}

/// `option` in an INI text. A command's own section goes before `[global]`, as in pip.
fn in_text(text: &str, option: &str) -> Option<String> {
    ["download", "install", "global"].iter().find_map(|wanted| {
        let mut section = "";
        let mut found = None;
        for line in text.lines().map(str::trim) {
            if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
                section = name.trim();
            } else if section == *wanted
                && !line.starts_with(['#', ';'])
                && let Some((key, value)) = line.split_once(['=', ':'])
                && key.trim().replace('_', "-").eq_ignore_ascii_case(option)
            {
                found = Some(value.trim().to_string()).filter(|value| !value.is_empty());
            }
        }
        found
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_and_spellings() {
        let text = "[global]\n# index-url = no\nindex-url = https://a/simple\ncert: /ca.pem\n[install]\nindex_url=https://b/x?y=z\n[x]\nproxy=p\n";
        assert_eq!(in_text(text, "index-url").as_deref(), Some("https://b/x?y=z"));
        assert_eq!(in_text(text, "cert").as_deref(), Some("/ca.pem"));
        assert_eq!(in_text(text, "proxy"), None);
        assert_eq!(in_text("index-url = outside\n[", "index-url"), None);
    }
}
