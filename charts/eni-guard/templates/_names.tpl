{{- define "eni-guard.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "eni-guard.selector" -}}
app.kubernetes.io/name: eni-guard
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "eni-guard.labels" -}}
{{ include "eni-guard.selector" . }}
app.kubernetes.io/part-of: eni-guard
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "eni-guard.image" -}}
{{- with .Values.image -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ with .digest }}@{{ . }}{{ end }}
{{- end -}}
{{- end -}}

{{- /*
Never the guard's own namespace, so that it can always be mended, nor exemptNamespaces. A namespace that is off is not even asked about; if
the default is off, only those are that say otherwise.
*/ -}}
{{- define "eni-guard.guardedNamespaces" -}}
matchExpressions:
- {key: kubernetes.io/metadata.name, operator: NotIn, values: [{{ prepend .Values.exemptNamespaces .Release.Namespace | uniq | join ", " }}]}
{{- if eq .Values.mode "off" }}
- {key: eni-guard.io/mode, operator: In, values: [deny, hold, audit]}
{{- else }}
- {key: eni-guard.io/mode, operator: NotIn, values: ["off"]}
{{- end }}
{{- end -}}

{{- /*
The guard's own taint must not keep the guard from being mended or uninstalled where every node has it.
*/ -}}
{{- define "eni-guard.tolerations" -}}
- {key: eni-guard.io/orphaned-sandbox, operator: Exists, effect: NoSchedule}
{{- with .Values.webhook.tolerations }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /*
Fails, naming the value that asks for it, where the cluster lacks a kind of object: (dict "root" $ "value" "prometheus.rule.enabled"
"api" "monitoring.coreos.com/v1/PrometheusRule" "from" "the Prometheus operator").
*/ -}}
{{- define "eni-guard.needs" -}}
{{- if not (.root.Capabilities.APIVersions.Has .api) -}}
{{- fail (printf "%s is true, but this cluster has no %s: install %s first, or set it to false. (`helm template` asks no cluster: tell it with --api-versions %s)" .value .api .from .api) -}}
{{- end -}}
{{- end -}}

{{- /*
A quantity as a number. The schema has let no other suffix through.
*/ -}}
{{- define "eni-guard.quantity" -}}
{{- if kindIs "string" . -}}
{{- $units := dict "" 1 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 -}}
{{- mulf (regexFind "^[0-9.]+" .) (get $units (regexFind "[A-Za-z]*$" .)) -}}
{{- else -}}
{{- . -}}
{{- end -}}
{{- end -}}
