use super::*;

fn new_backing(len_bytes: u64) -> (tempfile::TempDir, Backing) {
    let dir = tempfile::tempdir().unwrap();
    let backing = Backing::create(&dir.path().join("backing"), len_bytes, Allocation::Full).unwrap();
    (dir, backing)
}

fn put(backing: &Backing, offset: u64, bytes: &[u8]) -> Result<(), MediaError> {
    backing.write(offset..offset + bytes.len() as u64, |mut target| target.copy_from(bytes))
}

fn get(backing: &Backing, range: Range<u64>) -> Result<Vec<u8>, MediaError> {
    let mut out = vec![0; usize::try_from(range.end - range.start).unwrap()];
    backing.read(range, |source| source.copy_to(&mut out))?;
    Ok(out)
}

#[test]
fn stores_reach_the_file() {
    let (_dir, backing) = new_backing(3 * 4096 + 5);
    put(&backing, 4090, b"across pages").unwrap();
    backing.persist(4090..4102).unwrap();
    backing.sync_all().unwrap();
    let bytes = std::fs::read(backing.path()).unwrap();
    assert_eq!(bytes.len(), 3 * 4096 + 5);
    assert_eq!(&bytes[4090..4102], b"across pages");
    assert_eq!(get(&backing, 4090..4102).unwrap(), b"across pages");
}
