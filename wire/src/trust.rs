//! Whether a file is run as code: nobody but its user and root may have had a hand in it.
//!
//! A bridge becomes part of the job's process. Whoever may write to it, to a folder above it, or to a folder above a link
//! on the way to it, could put anything in its place, also after it was looked at. So every step of the way must be owned
//! by root or by this process's user, and writable by nobody else. A folder such as `/tmp`, where everybody may make files
//! and change their own alone (mode `t`), may be on the way; the next step is looked at all the same.

use std::{
    ffi::OsString,
    fs,
    io::{self, ErrorKind},
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

/// Links that are followed, as many as the kernel follows.
const MAX_LINKS: u32 = 40;

/// Why a file is not run as code.
#[derive(Debug, thiserror::Error)]
pub enum Distrust {
    /// It does not lead anywhere.
    #[error("{}: {error}", path.display())]
    Unreadable {
        /// Up to where it could be followed.
        path: PathBuf,
        /// Why no further.
        error: io::Error,
    },
    /// A step of the way belongs to somebody else.
    #[error("{} belongs to user {owner}, who could put other code there", path.display())]
    Owner {
        /// The step.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// Others may write to a step of the way.
    #[error("{} may be written to by others (mode {mode:o}), who could put other code there; run chmod go-w {}", path.display(), path.display())]
    Writable {
        /// The step.
        path: PathBuf,
        /// Its mode, without its type.
        mode: u32,
    },
}

impl Distrust {
    /// Whether there is nothing at the end of the way.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Unreadable { error, .. } if error.kind() == ErrorKind::NotFound)
    }
}

/// Looks at every step of the way to `path`, which may be a file or a folder. The error names the first that is not
/// trusted, or that is not there.
pub fn check(path: &Path) -> Result<(), Distrust> {
    // SAFETY: geteuid has no effects and cannot fail.
    walk(path, unsafe { libc::geteuid() })
}

/// The same up to the last step that is there: what is made below it is its maker's.
pub fn check_up_to(path: &Path) -> Result<(), Distrust> {
    match check(path) {
        Err(e) if e.is_absent() => Ok(()),
        outcome => outcome,
    }
}

fn walk(path: &Path, user: u32) -> Result<(), Distrust> {
    let unreadable = |path: &Path| {
        let path = path.to_owned();
        |error| Distrust::Unreadable { path, error }
    };
    let absolute = std::path::absolute(path).map_err(unreadable(path))?;
    let root = root_number();
    let mut here = PathBuf::from("/");
    look(&here, &fs::symlink_metadata(&here).map_err(unreadable(&here))?, user, root)?;
    let mut ahead = steps(&absolute);
    let mut links = 0;
    while let Some(step) = ahead.pop() {
        if step == ".." {
            here.pop();
            continue;
        }
        let next = here.join(&step);
        let found = fs::symlink_metadata(&next).map_err(unreadable(&next))?;
        look(&next, &found, user, root)?;
        if !found.is_symlink() {
            here = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(unreadable(&next)(io::Error::from_raw_os_error(libc::ELOOP)));
        }
        let target = fs::read_link(&next).map_err(unreadable(&next))?;
        if target.is_absolute() {
            here = PathBuf::from("/");
        }
        ahead.extend(steps(&target));
    }
    Ok(())
}

/// The steps of a path, the first one last.
fn steps(path: &Path) -> Vec<OsString> {
    let step = |part: Component<'_>| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    };
    path.components().rev().filter_map(step).collect()
}

fn look(path: &Path, found: &fs::Metadata, user: u32, root: u32) -> Result<(), Distrust> {
    let (owner, mode) = (found.uid(), found.mode() & 0o7777);
    if owner != user && owner != root {
        return Err(Distrust::Owner { path: path.to_owned(), owner });
    }
    let shared = found.is_dir() && mode & libc::S_ISVTX != 0;
    if !found.is_symlink() && mode & 0o022 != 0 && !shared {
        return Err(Distrust::Writable { path: path.to_owned(), mode });
    }
    Ok(())
}

/// The number that root's files have here.
fn root_number() -> u32 {
    let overflow = || fs::read_to_string("/proc/sys/kernel/overflowuid").ok()?.trim().parse().ok();
    match fs::read_to_string("/proc/self/uid_map") {
        Ok(map) if !maps_root(&map) => overflow().unwrap_or(0),
        _ => 0,
    }
}

/// Whether root has a number of its own. It has none in a container that knows its user alone, as Apptainer makes it: there
/// root's files seem to be nobody's.
fn maps_root(map: &str) -> bool {
    map.lines().any(|line| line.split_whitespace().next() == Some("0"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    /// A folder of this test's own, and in it `a/b/file`, all of them the owner's alone.
    struct Site(PathBuf);

    impl Site {
        fn new(name: &str) -> Self {
            let root = std::env::temp_dir().join(format!("flexmodel-trust-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&root);
            fs::create_dir_all(root.join("a/b")).unwrap();
            fs::write(root.join("a/b/file"), "").unwrap();
            let site = Self(root.canonicalize().unwrap());
            ["", "a", "a/b"].iter().for_each(|folder| site.mode(folder, 0o700));
            site.mode("a/b/file", 0o600);
            site
        }

        fn at(&self, name: &str) -> PathBuf {
            if name.is_empty() { self.0.clone() } else { self.0.join(name) }
        }

        fn mode(&self, name: &str, mode: u32) {
            fs::set_permissions(self.at(name), fs::Permissions::from_mode(mode)).unwrap();
        }

        /// The step that `path` is not trusted for.
        fn refused(&self, path: &str) -> PathBuf {
            match check(&self.at(path)) {
                Err(Distrust::Writable { path, .. } | Distrust::Owner { path, .. }) => path,
                other => panic!("{path}: {other:?}"),
            }
        }
    }

    impl Drop for Site {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_file_that_is_its_owners_alone_is_trusted_also_below_tmp() {
        let site = Site::new("own");
        assert!(check(&site.at("a/b/file")).is_ok());
        assert!(check(&site.at("a/../a/./b/file")).is_ok());
        site.mode("a/b", 0o755);
        site.mode("a", 0o1777);
        assert!(check(&site.at("a/b/file")).is_ok(), "a folder like /tmp");
    }

    #[test]
    fn every_step_that_others_may_write_to_is_refused_by_name() {
        let site = Site::new("mode");
        for (step, private) in [("", 0o700), ("a", 0o700), ("a/b", 0o700), ("a/b/file", 0o600)] {
            for others in [0o020, 0o002, 0o022] {
                site.mode(step, private | others);
                assert_eq!(site.refused("a/b/file"), site.at(step), "{others:o}");
            }
            site.mode(step, private);
        }
        site.mode("a/b/file", 0o1622);
        assert_eq!(site.refused("a/b/file"), site.at("a/b/file"), "mode t of a file says nothing");
    }

    #[test]
    fn a_link_is_followed_through_every_folder_on_its_way() {
        let site = Site::new("links");
        fs::create_dir_all(site.at("open/way")).unwrap();
        symlink("../../a/b", site.at("open/way/second")).unwrap();
        symlink(site.at("open/way/second"), site.at("first")).unwrap();
        assert!(check(&site.at("first/file")).is_ok());
        // Only the link in the middle is there.
        site.mode("open/way", 0o777);
        assert_eq!(site.refused("first/file"), site.at("open/way"));
        site.mode("open/way", 0o755);
        site.mode("a", 0o770);
        assert_eq!(site.refused("first/file"), site.at("a"));
        symlink("round", site.at("round")).unwrap();
        assert!(matches!(check(&site.at("round")), Err(Distrust::Unreadable { .. })));
    }

    #[test]
    fn another_users_step_is_refused() {
        let site = Site::new("owner");
        let nobody = 65534;
        if chown(site.at("a"), Some(nobody), None).is_err() {
            // Without root there is a file of somebody else's only where the caller is not who made it.
            return assert!(matches!(walk(&site.at("a/b/file"), u32::MAX), Err(Distrust::Owner { .. })));
        }
        assert_eq!(site.refused("a/b/file"), site.at("a"));
        chown(site.at("a"), Some(0), None).unwrap();
        symlink("a", site.at("link")).unwrap();
        std::os::unix::fs::lchown(site.at("link"), Some(nobody), None).unwrap();
        assert_eq!(site.refused("link/b/file"), site.at("link"));
    }

    #[test]
    fn what_is_not_there_is_no_harm_where_it_is_to_be_made() {
        let site = Site::new("absent");
        assert!(check(&site.at("a/c/d")).is_err_and(|e| e.is_absent()));
        assert!(check_up_to(&site.at("a/c/d")).is_ok());
        site.mode("a", 0o777);
        assert!(check_up_to(&site.at("a/c/d")).is_err());
    }

    #[test]
    fn the_line_names_the_way_out() {
        let site = Site::new("line");
        site.mode("a", 0o777);
        let line = check(&site.at("a/b/file")).unwrap_err().to_string();
        assert!(
            line.contains("(mode 777)") && line.ends_with(&format!("chmod go-w {}", site.at("a").display())),
            "{line}"
        );
    }

    #[test]
    fn root_has_a_number_unless_its_files_seem_to_be_nobodys() {
        assert!(maps_root("         0          0 4294967295\n"));
        assert!(maps_root("      1000       1000          1\n         0     100000      65536\n"));
        assert!(!maps_root("      1000       1000          1\n"));
    }
}
