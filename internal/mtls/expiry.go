package mtls

import "github.com/prometheus/client_golang/prometheus"

var expiryDesc = prometheus.NewDesc("eni_guard_certificate_expiry_timestamp_seconds",
	"When a certificate ends that is in use, as its file says now, in seconds since 1970.", []string{"certificate"}, nil)

// Expiry is a prometheus.Collector that tells when the certificate of each of some sources ends. The keys are what they are
// called. A certificate that cannot be read is left out: whoever needs it says so.
type Expiry map[string]Source

// Describe implements prometheus.Collector.
func (e Expiry) Describe(descriptions chan<- *prometheus.Desc) { descriptions <- expiryDesc }

// Collect implements prometheus.Collector. It reads files anew.
func (e Expiry) Collect(found chan<- prometheus.Metric) {
	for name, source := range e {
		if now, err := source.load(); err == nil {
			found <- prometheus.MustNewConstMetric(expiryDesc, prometheus.GaugeValue, float64(now.certificate.Leaf.NotAfter.Unix()), name)
		}
	}
}
