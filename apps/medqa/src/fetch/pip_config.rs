//! pip's settings on this machine: environment variables first, then pip's configuration files.
//!
//! See <https://pip.pypa.io/en/stable/topics/configuration/>.

use std::path::{Path, PathBuf};

/// Returns pip's `option` (`index-url`, `no-index`, `cert`, `proxy`), from the environment variable `PIP_…` or from the
/// first configuration file that sets it.
pub(super) fn option(option: &str) -> Option<String> {
    let variable = format!("PIP_{}", option.to_ascii_uppercase().replace('-', "_"));
    if let Some(value) = env_var(&variable) {
        return Some(value);
    }
    config_files().iter().find_map(|file| option_in_file(file, option))
}

/// Returns the value of an environment variable if it is set and not empty.
pub(super) fn env_var(name: &str) -> Option<String> {
    std::env::var(name).ok().map(|value| value.trim().to_string()).filter(|value| !value.is_empty())
}

/// Returns whether the value of a setting means true.
pub(super) fn is_true(value: &str) -> bool {
    ["1", "true", "yes", "on"].iter().any(|yes| value.eq_ignore_ascii_case(yes))
}

/// Returns pip's configuration files, the one with the highest priority first.
fn config_files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    if let Some(file) = env_var("PIP_CONFIG_FILE") {
        // pip reads no file at all when it is pointed at the null device.
        if file == "/dev/null" || file.eq_ignore_ascii_case("nul") {
            return files;
        }
        files.push(PathBuf::from(file));
    }
    files.extend(env_var("VIRTUAL_ENV").map(|venv| Path::new(&venv).join("pip.conf")));
    files.extend(env_var("XDG_CONFIG_HOME").map(|config| Path::new(&config).join("pip/pip.conf")));
    files.extend(env_var("APPDATA").map(|config| Path::new(&config).join("pip/pip.ini")));
    if let Some(home) = std::env::home_dir() {
        files.extend(
            ["Library/Application Support/pip/pip.conf", ".config/pip/pip.conf", ".pip/pip.conf"]
                .map(|file| home.join(file)),
        );
    }
    files.extend(["/etc/pip.conf", "/etc/xdg/pip/pip.conf"].map(PathBuf::from));
    files
}

fn option_in_file(file: &Path, option: &str) -> Option<String> {
    option_in_text(&std::fs::read_to_string(file).ok()?, option)
}

/// Returns `option` from an INI text. A command's own section takes precedence over `[global]`, as in pip.
fn option_in_text(text: &str, option: &str) -> Option<String> {
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
        assert_eq!(option_in_text(text, "index-url").as_deref(), Some("https://b/x?y=z"));
        assert_eq!(option_in_text(text, "cert").as_deref(), Some("/ca.pem"));
        assert_eq!(option_in_text(text, "proxy"), None);
        assert_eq!(option_in_text("index-url = outside\n[", "index-url"), None);
    }
}
