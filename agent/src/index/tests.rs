use wire::dtype::DType;

use super::*;
use crate::read::fixture::*;

fn two_parts() -> Fixture {
    let mut f = Fixture::default();
    for rank in 0..2 {
        f.part(id("layers.0.mlp", 3), DType::Float32, &[1], rank, dp(rank, 2, shard(0)), &f32s(&[1.0]));
    }
    f
}

#[test]
fn an_index_is_made_from_the_manifest_and_agrees_with_it() {
    let dir = two_parts().finish();
    assert!(!fresh(dir.path()));
    build(dir.path()).unwrap();
    assert!(fresh(dir.path()));
    check(&Run::open(dir.path()).unwrap()).unwrap();
    let db = open_readonly(&dir.path().join(INDEX_FILE)).unwrap();
    let question = "SELECT shape, axes, len FROM parts WHERE module = 'layers.0.mlp' AND step = 3 AND rank = 1";
    let (shape, axes, len): (String, String, i64) =
        db.query_row(question, [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).unwrap();
    assert_eq!((shape.as_str(), len), ("[1]", 4));
    assert!(axes.contains("\"dp\""), "{axes}");
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 4, "{left:?}");
}

#[test]
fn an_index_of_a_shorter_manifest_is_stale_and_one_that_lies_is_named() {
    let dir = two_parts().finish();
    build(dir.path()).unwrap();
    let db = Connection::open(dir.path().join(INDEX_FILE)).unwrap();
    db.execute("UPDATE parts SET crc = crc + 1 WHERE rank = 1", []).unwrap();
    let problem = check(&Run::open(dir.path()).unwrap()).unwrap_err().to_string();
    assert!(problem.contains("rank 1 0 times"), "{problem}");
    let mut more = two_parts();
    more.part(id("late", 4), DType::UInt8, &[1], 0, Vec::new(), &[1]);
    fs::write(dir.path().join(MANIFEST_FILE), &more.lines).unwrap();
    assert!(!fresh(dir.path()));
    refresh(&Run::open(dir.path()).unwrap());
    assert!(fresh(dir.path()));
}
