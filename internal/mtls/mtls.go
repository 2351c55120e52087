// Package mtls makes the TLS configurations with which the webhook and the agents authenticate each other.
//
// Both sides load their certificate and the authorities they trust again at every handshake. Handshakes are rare, because
// connections are kept, and what was rotated is then in force for the next connection without a restart.
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
	"sync/atomic"
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

// Source is where a side's certificate, and the authorities by which it judges the other side's, come from.
type Source interface {
	load() (*material, error)
}

type material struct {
	certificate tls.Certificate
	authorities *x509.CertPool
}

func parse(certificate, key, authorities []byte) (*material, error) {
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", certificateFile, keyFile, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(authorities) {
		return nil, fmt.Errorf("%s holds no PEM certificate", authorityFile)
	}
	return &material{pair, pool}, nil
}

// Dir is a directory with tls.crt, tls.key and ca.crt, such as a Secret that is mounted.
type Dir string

// Check reads the files once, so that a mistake is known at start and not at the first connection.
func (d Dir) Check() error {
	_, err := d.load()
	return err
}

// load reads the files. The kubelet replaces those of a mounted Secret all at once, but not while nobody reads them: from a
// mixture of old and new ones no certificate comes, and the second time all are new.
func (d Dir) load() (*material, error) {
	m, err := d.read()
	if err != nil {
		m, err = d.read()
	}
	return m, err
}

func (d Dir) read() (*material, error) {
	var contents [3][]byte
	for i, name := range []string{certificateFile, keyFile, authorityFile} {
		var err error
		if contents[i], err = os.ReadFile(filepath.Join(string(d), name)); err != nil {
			return nil, err
		}
	}
	m, err := parse(contents[0], contents[1], contents[2])
	if err != nil {
		return nil, fmt.Errorf("certificates in %s: %w", d, err)
	}
	return m, nil
}

// Memory holds what was read from a Secret. It is empty at first.
type Memory struct {
	current atomic.Pointer[material]
}

// Set takes over the data of a Secret with tls.crt, tls.key and ca.crt. On an error it keeps what it has.
func (m *Memory) Set(data map[string][]byte) error {
	now, err := parse(data[certificateFile], data[keyFile], data[authorityFile])
	if err != nil {
		return err
	}
	m.current.Store(now)
	return nil
}

// Check returns an error while nothing was set.
func (m *Memory) Check() error {
	_, err := m.load()
	return err
}

func (m *Memory) load() (*material, error) {
	now := m.current.Load()
	if now == nil {
		return nil, errors.New("there is no certificate yet")
	}
	return now, nil
}

// Certificate returns the certificate that is in force, for tls.Config.GetCertificate.
func (m *Memory) Certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	now, err := m.load()
	if err != nil {
		return nil, err
	}
	return &now.certificate, nil
}

// Server returns a configuration that lets in only peers whose certificate carries the name client.
func Server(source Source, client string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			now, err := source.load()
			if err != nil {
				return nil, err
			}
			return &tls.Config{
				MinVersion:   tls.VersionTLS13,
				Certificates: []tls.Certificate{now.certificate},
				ClientAuth:   tls.RequireAndVerifyClientCert,
				ClientCAs:    now.authorities,
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
func Dialer(source Source, dialer *net.Dialer, server string) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		now, err := source.load()
		if err != nil {
			return nil, err
		}
		return (&tls.Dialer{
			NetDialer: dialer,
			Config: &tls.Config{
				MinVersion:   tls.VersionTLS13,
				ServerName:   server,
				RootCAs:      now.authorities,
				Certificates: []tls.Certificate{now.certificate},
			},
		}).DialContext(ctx, network, address)
	}
}
