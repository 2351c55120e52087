// Package pki makes the certificates of the guard and rotates them: an authority, and leaves for the webhook as it faces the
// API server, for the agents, and for the webhook as it asks them. What to do next is decided by plan, from the content of
// the Secrets and the time; Rotator does it, in one replica of the webhook.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"
)

// backdate is how far the clock of a node may be behind without taking a new certificate for one of the future.
const backdate = time.Hour

// pair is a certificate with its key.
type pair struct {
	certificate *x509.Certificate
	key         crypto.Signer
}

// canSign says whether there is an authority, and it has not expired.
func (p *pair) canSign(now time.Time) bool { return p != nil && !now.After(p.certificate.NotAfter) }

// newAuthority makes an authority that signs itself.
func newAuthority(now time.Time, validity time.Duration) (*pair, error) {
	return issue(&x509.Certificate{
		// The time tells authorities apart for people; for programs, their keys do.
		Subject: pkix.Name{CommonName: "eni-guard authority of " + now.UTC().Format(time.RFC3339)},
		IsCA:    true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, nil, now, validity)
}

// newLeaf makes a certificate for a name, good for both ends of a connection: what a name may do is decided by the name.
func newLeaf(signer *pair, name string, now time.Time, validity time.Duration) (*pair, error) {
	return issue(&x509.Certificate{
		// A common name has at most 64 characters (RFC 5280, upper bounds); nobody reads it.
		Subject: pkix.Name{CommonName: "eni-guard"}, DNSNames: []string{name},
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, signer, now, validity)
}

// issue signs a certificate of a new key, by that key itself if there is no signer.
func issue(template *x509.Certificate, signer *pair, now time.Time, validity time.Duration) (*pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)); err != nil {
		return nil, err
	}
	template.NotBefore, template.NotAfter = now.Add(-backdate), now.Add(validity)
	parent, by := template, crypto.Signer(key)
	if signer != nil {
		parent, by = signer.certificate, signer.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), by)
	if err != nil {
		return nil, err
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &pair{certificate, key}, nil
}

// encode returns the pair as PEM.
func (p *pair) encode() (certificate, key []byte, err error) {
	if certificate, err = cert.EncodeCertificates(p.certificate); err != nil {
		return nil, nil, err
	}
	key, err = keyutil.MarshalPrivateKeyToPEM(p.key)
	return certificate, key, err
}

// decode reads a pair from PEM, and fails unless the key is the certificate's.
func decode(certificate, key []byte) (*pair, error) {
	read, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return nil, err
	}
	signer, isSigner := read.PrivateKey.(crypto.Signer)
	if !isSigner {
		return nil, errors.New("the key cannot sign")
	}
	return &pair{read.Leaf, signer}, nil
}

// decodeAll reads a list of certificates. What cannot be read is no certificate.
func decodeAll(list []byte) []*x509.Certificate {
	certificates, err := cert.ParseCertsPEM(list)
	if err != nil {
		return nil
	}
	return certificates
}

// encodeAll writes a list of certificates, each once.
func encodeAll(certificates []*x509.Certificate) ([]byte, error) {
	list, err := cert.EncodeCertificates(certificates...)
	if err != nil {
		return nil, fmt.Errorf("writing %d certificates: %w", len(certificates), err)
	}
	return list, nil
}

// signedBy says whether a certificate is of a pair's key.
func signedBy(certificate *x509.Certificate, signer *pair) bool {
	return signer != nil && certificate.CheckSignatureFrom(signer.certificate) == nil
}

// vouches says whether one of the authorities vouches, now, that a certificate is for a name.
func vouches(authorities []*x509.Certificate, certificate *x509.Certificate, name string, now time.Time) bool {
	roots := x509.NewCertPool()
	for _, authority := range authorities {
		roots.AddCert(authority)
	}
	_, err := certificate.Verify(x509.VerifyOptions{Roots: roots, DNSName: name, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err == nil
}

// union adds to a list what it does not have.
func union(list []*x509.Certificate, more ...*x509.Certificate) []*x509.Certificate {
	list = slices.Clone(list)
	for _, certificate := range more {
		if !slices.ContainsFunc(list, certificate.Equal) {
			list = append(list, certificate)
		}
	}
	return list
}
