//! The job's certificate authority and the identities of its members.
//!
//! One authority per job, made by whoever starts the job; its key lives in memory only. Each member
//! gets a short-lived leaf that names the job and the member twice: as a DNS name, which the standard
//! server verifier compares with the member that was dialled, and as a SPIFFE URI, which the accepting
//! side reads. Leaves name members, not ranks, because ranks change with the epoch.
//!
//! A key is made on the host of its member and does not leave it: what travels is a [`CertificateRequest`] and
//! the leaf. During a long job an [`Identity`] is [renewed](Identity::renew) in place: new connections use the
//! new leaf, existing ones go on.
//!
//! This module refuses to verify a peer: that is the work of rustls and webpki, set up in
//! `credentials` for every kind of link. There is no revocation; leaves are short-lived instead.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, Ed25519KeyPair, UnparsedPublicKey};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SignatureAlgorithm, SigningKey,
};
use rustls::SignatureScheme;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::secret::JobSecret;

/// What an authority's key that is derived from a secret is for. Part of the protocol.
const AUTHORITY_KEY: &str = "authority key";

/// The DNS zone and SPIFFE trust domain of all jobs. `.internal` is reserved for private use (ICANN, 2024).
const ZONE: &str = "paceline.internal";

/// How long before the moment of issue a certificate is valid, for hosts whose clocks are behind.
const CLOCK_SKEW: Duration = Duration::from_secs(300);

/// The life of an authority, and so the longest life of a leaf: longer than any job, ten years.
const AUTHORITY_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// The longest job or member name: one DNS label (RFC 1035, 2.3.4).
const NAME_LIMIT: usize = 63;

/// A job's certificate authority: whoever holds it decides who is a member.
///
/// The key is made here and cannot be exported; when the value is dropped no further member can be
/// admitted, while the identities already issued stay valid until they expire.
pub struct JobAuthority {
    job: String,
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

/// Who a member is: its name, the leaf that proves it, and the authority its peers must be of.
///
/// Holds the private key. Cheap to clone; clones are renewed together.
#[derive(Clone)]
pub struct Identity {
    job: String,
    member: String,
    authority: CertificateDer<'static>,
    current: Arc<RwLock<Current>>,
}

/// The part of an identity that is replaced when it is renewed.
#[derive(Clone)]
struct Current {
    key: Arc<PrivateKeyDer<'static>>,
    /// The leaf and the same key, as rustls takes them.
    certified: Arc<CertifiedKey>,
}

/// A new key of a member whose authority is elsewhere. Holds the private key.
pub struct KeyRequest {
    member: String,
    key: KeyPair,
}

/// Asks an authority to certify a key for a member. Signed with the key itself, so that nobody gets a leaf
/// for somebody else's key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateRequest {
    member: String,
    /// An uncompressed point of P-256.
    public_key: Vec<u8>,
    /// ECDSA with SHA-256 over [`requested`].
    signature: Vec<u8>,
}

/// The job and member that a leaf names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MemberName {
    pub(crate) job: String,
    pub(crate) member: String,
}

impl JobAuthority {
    /// Makes the authority of the job called `job`, with a new ECDSA P-256 key.
    ///
    /// Two authorities never trust each other's members, not even for a job of the same name.
    ///
    /// # Errors
    /// [`Error::Identity`] when the name is not 1 to 63 of `a-z`, `0-9` and `-`, without a `-` at either end.
    pub fn new(job: &str) -> Result<Self, Error> {
        Self::with_key(job, KeyPair::generate().map_err(unusable)?)
    }

    /// The authority that every holder of `secret` can make for itself, with an Ed25519 key derived from it: all of
    /// them trust the members of each other. Whoever knows the secret can be any member.
    ///
    /// # Errors
    /// As [`new`](JobAuthority::new).
    pub fn of_secret(job: &str, secret: &JobSecret) -> Result<Self, Error> {
        let seed = secret.derive(AUTHORITY_KEY);
        let pair = Ed25519KeyPair::from_seed_unchecked(&*seed).map_err(unusable)?;
        let document = pair.to_pkcs8v1().map_err(unusable)?;
        let key = PrivatePkcs8KeyDer::from(document.as_ref());
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&key, &rcgen::PKCS_ED25519).map_err(unusable)?;
        Self::with_key(job, key)
    }

    fn with_key(job: &str, key: KeyPair) -> Result<Self, Error> {
        check_name("job", job)?;
        let mut params = validity(SystemTime::now(), AUTHORITY_LIFE);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        // The key's own hash in the name: a leaf of another authority then fails as "unknown issuer"
        // and not as "bad signature", also when both jobs have the same name.
        let key_hash: String = params.key_identifier(&key).iter().map(|byte| format!("{byte:02x}")).collect();
        params.distinguished_name = common_name(&format!("Paceline job {job} {}", &key_hash[..16]));
        let certificate = params.self_signed(&key).map_err(unusable)?.into();
        Ok(Self { job: job.to_owned(), issuer: Issuer::new(params, key), certificate })
    }

    /// The job's name.
    pub fn job(&self) -> &str {
        &self.job
    }

    /// Makes the identity of one member, valid from now (and a few minutes before, for clock skew) for
    /// `valid_for`, as client and as server.
    ///
    /// # Errors
    /// [`Error::Identity`] when the member's name is not 1 to 63 of `a-z`, `0-9` and `-`, without a `-`
    /// at either end.
    pub fn issue(&self, member: &str, valid_for: Duration) -> Result<Identity, Error> {
        self.issue_at(member, SystemTime::now(), valid_for)
    }

    /// As [`issue`](JobAuthority::issue), with the clock as an argument.
    ///
    /// # Errors
    /// As [`issue`](JobAuthority::issue).
    pub fn issue_at(&self, member: &str, now: SystemTime, valid_for: Duration) -> Result<Identity, Error> {
        let request = KeyRequest::new(member)?;
        let leaf = self.leaf(member, &request.key, now, valid_for)?;
        request.into_identity(leaf, self.certificate.clone())
    }

    /// Certifies a key that was made elsewhere, from `now` (and a few minutes before) for `valid_for`. Of the
    /// request only the member's name and the key count; whether it may have them is for the caller to say.
    ///
    /// # Errors
    /// [`Error::Identity`] when the name is no member's or the request is not signed with its key.
    pub fn certify(
        &self,
        request: &CertificateRequest,
        now: SystemTime,
        valid_for: Duration,
    ) -> Result<CertificateDer<'static>, Error> {
        let CertificateRequest { member, public_key, signature } = request;
        check_name("member", member)?;
        let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, public_key);
        let signed = key.verify(&requested(member, public_key), signature);
        signed.map_err(|_| unusable(format!("the request of {member} is not signed with its key")))?;
        self.leaf(member, &PublicKey(public_key), now, valid_for)
    }

    /// The authority's own certificate.
    pub(crate) fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    fn leaf(
        &self,
        member: &str,
        key: &impl PublicKeyData,
        now: SystemTime,
        valid_for: Duration,
    ) -> Result<CertificateDer<'static>, Error> {
        let mut params = validity(now, valid_for);
        params.distinguished_name = common_name(member);
        params.subject_alt_names = vec![
            SanType::DnsName(dns_name(&self.job, member).try_into().map_err(unusable)?),
            SanType::URI(spiffe_id(&self.job, member).try_into().map_err(unusable)?),
        ];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(key, &self.issuer).map_err(unusable)?.into())
    }
}

impl KeyRequest {
    /// Makes an ECDSA P-256 key for `member`.
    ///
    /// # Errors
    /// [`Error::Identity`] when the name is not 1 to 63 of `a-z`, `0-9` and `-`, without a `-` at either end.
    pub fn new(member: &str) -> Result<Self, Error> {
        check_name("member", member)?;
        Ok(Self { member: member.to_owned(), key: KeyPair::generate().map_err(unusable)? })
    }

    /// What is sent to the authority.
    ///
    /// # Errors
    /// [`Error::Identity`] when the key cannot sign.
    pub fn request(&self) -> Result<CertificateRequest, Error> {
        let public_key = self.key.der_bytes().to_vec();
        let signature = self.key.sign(&requested(&self.member, &public_key)).map_err(unusable)?;
        Ok(CertificateRequest { member: self.member.clone(), public_key, signature })
    }

    /// The identity, with the leaf and the authority's certificate that came back.
    ///
    /// # Errors
    /// [`Error::Identity`] when the leaf is not of this key or names no member.
    pub fn into_identity(
        self,
        leaf: CertificateDer<'static>,
        authority: CertificateDer<'static>,
    ) -> Result<Identity, Error> {
        let key = PrivatePkcs8KeyDer::from(self.key.serialize_der());
        Identity::new(key.into(), vec![leaf], authority)
    }
}

impl CertificateRequest {
    /// The member that the key is to be certified for, as it was written: not a valid name before
    /// [`JobAuthority::certify`] has said so.
    pub fn member(&self) -> &str {
        &self.member
    }
}

#[cfg(test)]
impl CertificateRequest {
    /// The same key and signature with another name.
    pub(crate) fn for_another_member(self, member: &str) -> Self {
        Self { member: member.to_owned(), ..self }
    }
}

/// What a [`CertificateRequest`] signs.
fn requested(member: &str, public_key: &[u8]) -> Vec<u8> {
    [b"paceline certificate request 1\0", member.as_bytes(), b"\0", public_key].concat()
}

/// A P-256 key of which only the public half is here.
struct PublicKey<'a>(&'a [u8]);

impl PublicKeyData for PublicKey<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

impl Identity {
    /// Reads an identity from one PEM text with the private key, the leaf, certificates between it and the
    /// authority if there are any, and last the authority's certificate. Job and member are read from the leaf.
    ///
    /// An expired leaf is accepted here; peers will refuse it.
    ///
    /// # Errors
    /// [`Error::Identity`] when a part is missing or malformed, when there are two authorities, or when the key is
    /// not the leaf's.
    pub fn from_pem(bundle: &str) -> Result<Self, Error> {
        let mut chain: Vec<_> = CertificateDer::pem_slice_iter(bundle.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(|error| unusable(format!("malformed PEM: {error}")))?;
        let found = chain.len();
        let authority = chain.pop().filter(|_| found >= 2).ok_or_else(|| {
            unusable(format!("expected the leaf and the authority, found {found} certificates"))
        })?;
        let key = PrivateKeyDer::from_pem_slice(bundle.as_bytes())
            .map_err(|error| unusable(format!("no usable private key: {error}")))?;
        Self::new(key, chain, authority)
    }

    /// `chain` begins with the leaf.
    fn new(
        key: PrivateKeyDer<'static>,
        chain: Vec<CertificateDer<'static>>,
        authority: CertificateDer<'static>,
    ) -> Result<Self, Error> {
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let certified = CertifiedKey::from_der(chain, key.clone_key(), &provider)
            .map_err(|error| unusable(format!("the key and the certificate do not fit: {error}")))?;
        let leaf = certified.end_entity_cert().map_err(unusable)?;
        let MemberName { job, member } = MemberName::of(leaf).map_err(unusable)?;
        let current = Current { key: Arc::new(key), certified: Arc::new(certified) };
        Ok(Self { job, member, authority, current: Arc::new(RwLock::new(current)) })
    }

    /// Takes over the key and the leaf of `fresh`, here and in all clones: endpoints made with this identity
    /// show the new leaf from their next handshake on. Connections go on.
    ///
    /// # Errors
    /// [`Error::Identity`] when `fresh` is another member's or of another authority; then nothing has changed.
    pub fn renew(&self, fresh: &Identity) -> Result<(), Error> {
        if (&fresh.job, &fresh.member, &fresh.authority) != (&self.job, &self.member, &self.authority) {
            return Err(unusable(format!(
                "{} of {} cannot be renewed as {} of {}, or by another authority",
                self.member, self.job, fresh.member, fresh.job
            )));
        }
        let fresh = fresh.current();
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    /// The PEM text that [`from_pem`](Identity::from_pem) reads. It contains the private key: write it
    /// to a file only its owner can read.
    pub fn to_pem(&self) -> String {
        let Current { key, certified } = self.current();
        let certificates = certified.cert.iter().chain([&self.authority]);
        let certificates = certificates.map(|certificate| pem("CERTIFICATE", certificate));
        let label = match &*key {
            PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
            PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
            _ => "PRIVATE KEY",
        };
        std::iter::once(pem(label, key.secret_der())).chain(certificates).collect()
    }

    /// The job's name.
    pub fn job(&self) -> &str {
        &self.job
    }

    /// This member's name.
    pub fn member(&self) -> &str {
        &self.member
    }

    /// The DNS name that the certificate of another member of this job carries.
    pub fn server_name(&self, member: &str) -> String {
        dns_name(&self.job, member)
    }

    pub(crate) fn authority(&self) -> CertificateDer<'static> {
        self.authority.clone()
    }

    /// For rustls: the leaf and key of the moment of each handshake.
    pub(crate) fn resolver(&self) -> Arc<CurrentLeaf> {
        Arc::new(CurrentLeaf(self.clone()))
    }

    fn current(&self) -> Current {
        // Replaced whole.
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Shows an identity's leaf of the moment in every handshake, on either side.
#[derive(Debug)]
pub(crate) struct CurrentLeaf(Identity);

impl rustls::client::ResolvesClientCert for CurrentLeaf {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.current().certified)
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl rustls::server::ResolvesServerCert for CurrentLeaf {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.current().certified)
    }
}

impl MemberName {
    /// Reads the names in a leaf. Says nothing about whether the leaf is valid.
    pub(crate) fn of(leaf: &CertificateDer<'_>) -> Result<Self, String> {
        let leaf =
            webpki::EndEntityCert::try_from(leaf).map_err(|error| format!("not a certificate: {error}"))?;
        let mut names = leaf.valid_uri_names().filter_map(parse_spiffe_id);
        match (names.next(), names.next()) {
            (Some(name), None) => Ok(name),
            (None, _) => Err("the certificate names no member of a Paceline job".to_owned()),
            (Some(_), Some(_)) => Err("the certificate names more than one member".to_owned()),
        }
    }
}

impl fmt::Debug for JobAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JobAuthority").field("job", &self.job).finish_non_exhaustive()
    }
}

impl fmt::Debug for KeyRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRequest").field("member", &self.member).finish_non_exhaustive()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("job", &self.job)
            .field("member", &self.member)
            .field("key", &"<redacted>")
            .finish_non_exhaustive()
    }
}

/// One PEM block (RFC 7468).
fn pem(label: &str, der: &[u8]) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new(label, der), config)
}

fn dns_name(job: &str, member: &str) -> String {
    format!("{member}.{job}.{ZONE}")
}

fn spiffe_id(job: &str, member: &str) -> String {
    format!("spiffe://{ZONE}/job/{job}/member/{member}")
}

fn parse_spiffe_id(uri: &str) -> Option<MemberName> {
    let path = uri.strip_prefix("spiffe://")?.strip_prefix(ZONE)?.strip_prefix("/job/")?;
    let (job, member) = path.split_once("/member/")?;
    check_name("job", job).ok()?;
    check_name("member", member).ok()?;
    Some(MemberName { job: job.to_owned(), member: member.to_owned() })
}

fn check_name(kind: &str, name: &str) -> Result<(), Error> {
    let fits = !name.is_empty()
        && name.len() <= NAME_LIMIT
        && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        && !name.starts_with('-')
        && !name.ends_with('-');
    if fits {
        return Ok(());
    }
    Err(unusable(format!(
        "the {kind} name {name:?} must be 1 to {NAME_LIMIT} of a-z, 0-9 and '-', and not start or end with '-'"
    )))
}

fn validity(now: SystemTime, valid_for: Duration) -> CertificateParams {
    // A clock before 1970 counts as 1970: the certificate is then expired, which the peers will say.
    let since_1970 = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let mut params = CertificateParams::default();
    params.not_before = epoch + since_1970.saturating_sub(CLOCK_SKEW);
    params.not_after = epoch + since_1970 + valid_for.min(AUTHORITY_LIFE);
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished_name = DistinguishedName::new();
    distinguished_name.push(DnType::CommonName, name);
    distinguished_name
}

fn unusable(reason: impl ToString) -> Error {
    Error::Identity { reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn leaf(identity: &Identity) -> CertificateDer<'static> {
        identity.current().certified.cert[0].clone()
    }

    fn identity(job: &str, member: &str) -> Identity {
        let authority = JobAuthority::new(job).expect("a valid job name");
        authority.issue(member, HOUR).expect("a valid member name")
    }

    #[test]
    fn an_identity_names_its_job_and_member_and_survives_its_file() {
        let original = identity("job-7", "worker-0");
        let read = Identity::from_pem(&original.to_pem()).expect("own output is readable");
        for identity in [&original, &read] {
            assert_eq!((identity.job(), identity.member()), ("job-7", "worker-0"));
            assert_eq!(identity.server_name("worker-1"), "worker-1.job-7.paceline.internal");
        }
        assert_eq!(leaf(&read), leaf(&original));
        assert_eq!(read.authority(), original.authority());
        assert_eq!(read.current().key, original.current().key);
    }

    #[test]
    fn the_leaf_is_valid_for_its_dns_name_and_no_other() {
        let identity = identity("job", "worker-0");
        let leaf = leaf(&identity);
        let leaf = webpki::EndEntityCert::try_from(&leaf).expect("a certificate");
        let valid_for = |name: &str| {
            let name = name.to_owned().try_into().expect("a DNS name");
            leaf.verify_is_valid_for_subject_name(&name).is_ok()
        };
        assert!(valid_for("worker-0.job.paceline.internal"));
        assert!(!valid_for("worker-1.job.paceline.internal"));
        assert!(!valid_for("worker-0.other.paceline.internal"));
    }

    #[test]
    fn names_that_are_not_a_dns_label_are_refused_by_name() {
        let long = "x".repeat(64);
        let authority = JobAuthority::new("job").expect("a valid job name");
        for name in ["", "Job", "a.b", "a/b", "ä", "-a", "a-", "a b", &long] {
            for result in [JobAuthority::new(name).err(), authority.issue(name, HOUR).err()] {
                let text = result.expect("refused").to_string();
                assert!(text.contains(&format!("{name:?}")), "{text}");
            }
        }
        assert!(JobAuthority::new(&long[..63]).is_ok());
    }

    #[test]
    fn debug_output_holds_no_key() {
        let identity = identity("job", "worker-0");
        let text = format!("{identity:?}");
        assert!(text.contains("worker-0") && text.contains("redacted"), "{text}");
        assert!(!text.contains("PRIVATE") && text.len() < 120, "{text}");
    }

    #[test]
    fn a_key_is_certified_where_its_request_is_signed_with_it() {
        let authority = JobAuthority::new("job").expect("a valid job name");
        let key = KeyRequest::new("worker-1").expect("a valid member name");
        let request = key.request().expect("a signature");
        let certify = |request: &CertificateRequest| authority.certify(request, SystemTime::now(), HOUR);
        let leaf = certify(&request).expect("signed");
        let identity = key.into_identity(leaf.clone(), authority.certificate()).expect("they fit");
        assert_eq!((identity.job(), identity.member()), ("job", "worker-1"));
        assert_eq!(Identity::from_pem(&identity.to_pem()).expect("readable").member(), "worker-1");
        let another = KeyRequest::new("worker-1").expect("a valid member name");
        assert!(another.into_identity(leaf, authority.certificate()).is_err(), "another key");
        for wrong in [
            CertificateRequest { member: "worker-2".to_owned(), ..request.clone() },
            CertificateRequest { member: "../x".to_owned(), ..request.clone() },
            CertificateRequest { signature: Vec::new(), ..request.clone() },
            CertificateRequest { public_key: vec![4; 65], ..request.clone() },
            CertificateRequest { public_key: Vec::new(), ..request },
        ] {
            assert!(certify(&wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn bundles_with_missing_or_foreign_parts_are_refused() {
        let (one, other) = (identity("job", "a").to_pem(), identity("job", "b").to_pem());
        let part = |bundle: &str, n: usize| -> String {
            let ends: Vec<usize> =
                bundle.match_indices("-----BEGIN").map(|(at, _)| at).chain([bundle.len()]).collect();
            bundle[ends[n]..ends[n + 1]].to_owned()
        };
        let reason = |parts: &[String]| {
            Identity::from_pem(&parts.concat()).expect_err("an unusable bundle").to_string()
        };
        let (key, leaf, authority) = (part(&one, 0), part(&one, 1), part(&one, 2));
        assert!(Identity::from_pem(&[key.clone(), leaf.clone(), authority.clone()].concat()).is_ok());
        assert!(reason(&[]).contains("found 0 certificates"));
        assert!(reason(&[key.clone(), leaf.clone()]).contains("found 1 certificates"));
        assert!(reason(&[leaf.clone(), authority.clone()]).contains("no usable private key"));
        assert!(reason(&[part(&other, 0), leaf, authority.clone()]).contains("do not fit"));
        assert!(reason(&["-----BEGIN CERTIFICATE-----\n!!".to_owned()]).contains("malformed PEM"));
        assert!(reason(&[key, authority.clone(), authority]).contains("do not fit"));
    }

    #[test]
    fn a_spiffe_id_of_another_shape_is_not_a_member() {
        let good = "spiffe://paceline.internal/job/j/member/m";
        assert!(parse_spiffe_id(good).is_some());
        for bad in [
            "spiffe://elsewhere/job/j/member/m",
            "spiffe://paceline.internal.evil/job/j/member/m",
            "spiffe://paceline.internal/job/j/member/m/member/x",
            "spiffe://paceline.internal/job//member/m",
            "spiffe://paceline.internal/job/j",
            "https://paceline.internal/job/j/member/m",
        ] {
            assert_eq!(parse_spiffe_id(bad), None, "{bad}");
        }
    }

    #[test]
    fn any_clock_and_any_life_give_a_certificate() {
        let authority = JobAuthority::new("job").expect("a valid job name");
        let before_1970 = SystemTime::UNIX_EPOCH - HOUR;
        for (now, valid_for) in [(before_1970, Duration::ZERO), (SystemTime::now(), Duration::MAX)] {
            authority.issue_at("m", now, valid_for).expect("issued");
        }
    }

    proptest! {
        #[test]
        fn any_name_in_a_certificate_is_a_members_or_none(text in ".{0,60}", job in "[a-z-]{0,9}", member in ".{0,9}") {
            prop_assert_eq!(parse_spiffe_id(&text), None);
            if let Some(name) = parse_spiffe_id(&spiffe_id(&job, &member)) {
                prop_assert_eq!((name.job, name.member), (job, member));
            }
        }

        #[test]
        fn any_request_is_certified_or_refused(member in ".{0,70}", key: Vec<u8>, signature: Vec<u8>) {
            let authority = JobAuthority::new("job").expect("a valid job name");
            let request = CertificateRequest { member, public_key: key, signature };
            let certified = authority.certify(&request, SystemTime::now(), HOUR);
            prop_assert!(certified.is_err(), "nobody guesses a signature");
        }

        #[test]
        fn a_damaged_certificate_is_read_or_refused(at: prop::sample::Index, value: u8) {
            let mut bytes = leaf(&identity("job", "worker-0")).to_vec();
            let at = at.index(bytes.len());
            bytes[at] = value;
            // Of whatever it names: its signature is checked elsewhere, and does not fit any more.
            let _ = MemberName::of(&CertificateDer::from(bytes));
        }

        #[test]
        fn arbitrary_bytes_are_no_certificate(bytes: Vec<u8>) {
            prop_assert!(MemberName::of(&CertificateDer::from(bytes)).is_err());
        }

        #[test]
        fn arbitrary_text_is_no_identity(text in ".{0,200}") {
            prop_assert!(Identity::from_pem(&text).is_err());
        }
    }
}
