//! The channel between two launchers that share a secret: TLS settings, the proof, and messages.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::hmac;
use aws_lc_rs::signature::Ed25519KeyPair;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs as provider, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use zeroize::Zeroizing;

use super::Claim;
use crate::Error;
use crate::secret::JobSecret;
use crate::wire::{self, WireError};

/// The protocol's name in the TLS handshake. Its versions are in the greeting.
pub(super) const ALPN: &[u8] = b"paceline-boot";

/// The longest message, in bytes: an authority's certificate has some 500.
pub(super) const MESSAGE_LIMIT: usize = 4096;

/// What the exporter is asked for (RFC 8446, 7.5).
const EXPORTER: &[u8] = b"EXPORTER-paceline-boot";

/// What the derived keys are for. Part of the protocol.
const SERVER_KEY: &str = "bootstrap server key";
const PROOF_KEY: &str = "bootstrap proof key";

/// The key with which a holder of the secret serves, and by which it is recognised: both halves.
fn server_key(secret: &JobSecret) -> Result<(Arc<dyn SigningKey>, SubjectPublicKeyInfoDer<'static>), Error> {
    let seed = secret.derive(SERVER_KEY);
    let pair = Ed25519KeyPair::from_seed_unchecked(&*seed).map_err(unusable)?;
    let document = pair.to_pkcs8v1().map_err(unusable)?;
    let key = PrivatePkcs8KeyDer::from(document.as_ref());
    let key = provider::sign::any_eddsa_type(&key).map_err(unusable)?;
    let public = key.public_key().map(|public| public.into_owned());
    let public = public.ok_or_else(|| unusable("an Ed25519 key without its public half"))?;
    Ok((key, public))
}

/// Settings of the side that serves.
pub(super) fn server_config(secret: &JobSecret) -> Result<rustls::ServerConfig, Error> {
    let (key, public) = server_key(secret)?;
    // A raw public key (RFC 7250): a certificate would say nothing more.
    let key = CertifiedKey::new(vec![CertificateDer::from(public.to_vec())], key);
    let resolver = AlwaysResolvesServerRawPublicKeys::new(Arc::new(key));
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(provider::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(config)
}

/// Settings of the side that dials: only a holder of the same secret is talked to.
pub(super) fn client_config(secret: &JobSecret) -> Result<rustls::ClientConfig, Error> {
    let provider = Arc::new(provider::default_provider());
    let (_, public) = server_key(secret)?;
    let verifier = PinnedKey { public, provider: provider.clone() };
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}

/// Takes one public key and no other.
struct PinnedKey {
    public: SubjectPublicKeyInfoDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for PinnedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PinnedKey")
    }
}

impl ServerCertVerifier for PinnedKey {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        // A public key is no secret: this comparison may take its time.
        if end_entity.as_ref() == self.public.as_ref() {
            return Ok(ServerCertVerified::assertion());
        }
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // TLS 1.2 is not offered.
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        _: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature_with_raw_key(message, &self.public, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// What only the two ends of one channel know, and what the proof is made over.
pub(super) struct Binding(Zeroizing<[u8; 32]>);

impl Binding {
    /// Of the channel of `connection`, whose handshake is over.
    pub(super) fn of<Data>(connection: &rustls::ConnectionCommon<Data>) -> Result<Self, String> {
        let exported = connection.export_keying_material([0; 32], EXPORTER, None);
        exported.map(|bytes| Self(Zeroizing::new(bytes))).map_err(|error| error.to_string())
    }

    /// Shows that whoever has this end of the channel knows the secret, and says `claim`.
    pub(super) fn prove(&self, secret: &JobSecret, claim: &Claim) -> Result<Vec<u8>, WireError> {
        Ok(hmac::sign(&proof_key(secret), &self.proven(claim)?).as_ref().to_vec())
    }

    /// Checks a proof, in the same time whatever is wrong with it.
    pub(super) fn check(&self, secret: &JobSecret, claim: &Claim, proof: &[u8]) -> bool {
        self.proven(claim).is_ok_and(|proven| hmac::verify(&proof_key(secret), &proven, proof).is_ok())
    }

    fn proven(&self, claim: &Claim) -> Result<Zeroizing<Vec<u8>>, WireError> {
        let claim = wire::encode(claim)?;
        Ok(Zeroizing::new([&self.0[..], &claim].concat()))
    }
}

fn proof_key(secret: &JobSecret) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, &*secret.derive(PROOF_KEY))
}

/// Sends one message.
pub(super) async fn send<T: Serialize>(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &T,
) -> Result<(), String> {
    let body = wire::encode(message).map_err(|error| error.to_string())?;
    let len = u32::try_from(body.len()).ok().filter(|_| body.len() <= MESSAGE_LIMIT);
    let len = len.ok_or_else(|| too_long(body.len()))?;
    let bytes = [&len.to_le_bytes()[..], &body].concat();
    stream.write_all(&bytes).await.map_err(|error| error.to_string())?;
    stream.flush().await.map_err(|error| error.to_string())
}

/// Receives one message; `None` when the other side has ended the conversation before it.
pub(super) async fn receive<T: DeserializeOwned>(
    stream: &mut (impl AsyncRead + Unpin),
) -> Result<Option<T>, String> {
    let mut prefix = [0; 4];
    match stream.read_exact(&mut prefix).await {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error.to_string()),
    }
    let len = usize::try_from(u32::from_le_bytes(prefix)).unwrap_or(usize::MAX);
    if len > MESSAGE_LIMIT {
        return Err(too_long(len));
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await.map_err(|error| error.to_string())?;
    wire::decode(&body).map(Some).map_err(|error| error.to_string())
}

fn too_long(len: usize) -> String {
    WireError::TooLong { len, limit: MESSAGE_LIMIT }.to_string()
}

fn unusable(reason: impl ToString) -> Error {
    Error::Identity { reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Answer, Ask};
    use super::*;
    use crate::identity::KeyRequest;

    fn secret(text: &str) -> JobSecret {
        JobSecret::new(text.as_bytes()).expect("long enough")
    }

    fn claim() -> Claim {
        Claim {
            node: 1,
            nodes: 2,
            least_nodes: 2,
            ranks_per_node: 4,
            run_id: "run".to_owned(),
            incarnation: 7,
        }
    }

    #[test]
    fn a_proof_is_good_for_its_channel_its_claim_and_its_secret_alone() {
        let (here, there) = (Binding(Zeroizing::new([1; 32])), Binding(Zeroizing::new([2; 32])));
        let ours = secret("0123456789abcdef");
        let proof = here.prove(&ours, &claim()).expect("a short claim");
        assert!(here.check(&ours, &claim(), &proof));
        assert!(!there.check(&ours, &claim(), &proof), "replayed on another channel");
        assert!(!here.check(&ours, &Claim { node: 0, ..claim() }, &proof), "another claim");
        assert!(!here.check(&secret("0123456789abcdeX"), &claim(), &proof), "another secret");
        assert!(!here.check(&ours, &claim(), &proof[..31]) && !here.check(&ours, &claim(), &[]));
    }

    #[test]
    fn the_debug_output_of_a_claim_holds_no_incarnation() {
        assert_eq!(format!("{:?}", claim()), "node 1 of 2 with 4 ranks");
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(future)
    }

    #[test]
    fn messages_survive_the_stream_and_its_end_is_told() {
        let request = KeyRequest::new("worker-1").expect("a name").request().expect("a signature");
        let ask = Ask::Certify(request);
        let mut stream = Vec::new();
        run(send(&mut stream, &ask)).expect("a vector takes all");
        let mut bytes = stream.as_slice();
        assert_eq!(run(receive(&mut bytes)), Ok(Some(ask)));
        assert_eq!(run(receive::<Ask>(&mut bytes)), Ok(None));
        assert!(run(receive::<Ask>(&mut &[255u8, 255, 0, 0, 1][..])).is_err_and(|e| e.contains("65535")));
    }

    proptest! {
        #[test]
        fn any_bytes_are_messages_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = run(receive::<Ask>(&mut bytes.as_slice()));
            let _ = run(receive::<Answer>(&mut bytes.as_slice()));
            let _ = wire::decode::<Ask>(&bytes);
            let _ = wire::decode::<Answer>(&bytes);
        }
    }
}
