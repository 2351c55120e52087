// Package mtls makes the TLS configurations with which the webhook and the agents authenticate each other.
//
// Both sides read their files again at every handshake. Handshakes are rare, because connections are kept, and a
// rotated certificate or authority is then in force for the next connection without a watcher or a restart.
package mtls

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
)

// The names that the two sides carry in their certificates (a DNS name of the subject alternative names). They stand
// for a role, not for a host: an agent is reached by its node's address.
const (
	AgentName   = "eni-guard-agent"
	WebhookName = "eni-guard-webhook"
)

// Files are the names of the files in a directory of certificates, as in a Secret of type kubernetes.io/tls.
const (
	certificateFile = "tls.crt"
	keyFile         = "tls.key"
	authorityFile   = "ca.crt"
)

// Dir is a directory with tls.crt, tls.key and ca.crt.
type Dir string

// Check reads the files once, so that a mistake is known at start and not at the first connection.
func (d Dir) Check() error {
	_, _, err := d.load()
	return err
}

func (d Dir) load() (tls.Certificate, *x509.CertPool, error) {
	certificate, err := tls.LoadX509KeyPair(filepath.Join(string(d), certificateFile), filepath.Join(string(d), keyFile))
	if err != nil {
		return tls.Certificate{}, nil, fmt.Errorf("certificate in %s: %w", d, err)
	}
	authority, err := os.ReadFile(filepath.Join(string(d), authorityFile))
	if err != nil {
		return tls.Certificate{}, nil, fmt.Errorf("certificate authority in %s: %w", d, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(authority) {
		return tls.Certificate{}, nil, fmt.Errorf("certificate authority in %s: %s holds no PEM certificate", d, authorityFile)
	}
	return certificate, pool, nil
}

// Server returns a configuration that lets in only peers whose certificate carries the name client.
func (d Dir) Server(client string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			certificate, pool, err := d.load()
			if err != nil {
				return nil, err
			}
			return &tls.Config{
				MinVersion:   tls.VersionTLS13,
				Certificates: []tls.Certificate{certificate},
				ClientAuth:   tls.RequireAndVerifyClientCert,
				ClientCAs:    pool,
				VerifyConnection: func(state tls.ConnectionState) error {
					if len(state.PeerCertificates) == 0 {
						return errors.New("the client sent no certificate")
					}
					return state.PeerCertificates[0].VerifyHostname(client)
				},
			}, nil
		},
	}
}

// Dialer returns a function for http.Transport.DialTLSContext that accepts only a server whose certificate carries the
// name server, whatever address it is reached at.
func (d Dir) Dialer(dialer *net.Dialer, server string) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		certificate, pool, err := d.load()
		if err != nil {
			return nil, err
		}
		return (&tls.Dialer{
			NetDialer: dialer,
			Config: &tls.Config{
				MinVersion:   tls.VersionTLS13,
				ServerName:   server,
				RootCAs:      pool,
				Certificates: []tls.Certificate{certificate},
			},
		}).DialContext(ctx, network, address)
	}
}
