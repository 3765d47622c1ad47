//! A round's words as bytes, little-endian. Ranks of one job run one FlexModel: it has no version of its own.

use wire::record::RecordMeta;

use super::agreement::{Held, Offer, Report};

const CLOSING: u8 = 1;
const LEAVING: u8 = 2;

/// The bytes of `report`.
pub fn encode(report: &Report) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + 256 * report.offers.len());
    out.push(if report.closing { CLOSING } else { 0 } | if report.leaving { LEAVING } else { 0 });
    out.extend_from_slice(&report.step.to_le_bytes());
    out.extend_from_slice(&(report.withdrawn.len() as u32).to_le_bytes());
    report.withdrawn.iter().for_each(|n| out.extend_from_slice(&n.to_le_bytes()));
    let mut meta = Vec::new();
    for offer in &report.offers {
        meta.clear();
        offer.meta.encode(&mut meta);
        out.push(offer.held as u8);
        out.extend_from_slice(&(meta.len() as u32).to_le_bytes());
        out.extend_from_slice(&meta);
    }
    out
}

/// What [`encode`] made bytes of; `None` for other bytes.
pub fn decode(mut bytes: &[u8]) -> Option<Report> {
    let flags = number::<1>(&mut bytes)?[0];
    let mut report = Report { closing: flags & CLOSING != 0, leaving: flags & LEAVING != 0, ..Report::default() };
    report.step = u64::from_le_bytes(number(&mut bytes)?);
    for _ in 0..u32::from_le_bytes(number(&mut bytes)?) {
        report.withdrawn.push(u64::from_le_bytes(number(&mut bytes)?));
    }
    while !bytes.is_empty() {
        let code = number::<1>(&mut bytes)?[0];
        let held = [Held::Not, Held::Host, Held::Device].into_iter().find(|held| *held as u8 == code)?;
        let len = u32::from_le_bytes(number(&mut bytes)?) as usize;
        let (meta, rest) = bytes.split_at_checked(len)?;
        report.offers.push(Offer { meta: RecordMeta::decode(meta).ok()?, held });
        bytes = rest;
    }
    Some(report)
}

fn number<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*head)
}

#[cfg(test)]
mod tests {
    use wire::dtype::DType;

    use super::*;

    #[test]
    fn words_round_trip_and_cut_ones_are_refused() {
        let meta = RecordMeta::output("layers.0.mlp", DType::BFloat16, vec![2, 3]);
        let offers = vec![Offer { meta: meta.clone(), held: Held::Device }, Offer { meta, held: Held::Not }];
        let report = Report { step: 7, closing: true, leaving: false, offers, withdrawn: vec![1, 5] };
        let bytes = encode(&report);
        assert_eq!(decode(&bytes), Some(report));
        let whole: Vec<usize> = (0..bytes.len()).filter(|&n| decode(&bytes[..n]).is_some()).collect();
        // Between two offers a shorter list is as good a list.
        assert_eq!(whole.len(), 2, "{whole:?}");
    }
}
