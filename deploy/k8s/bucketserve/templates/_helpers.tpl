{{- define "bucketserve.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{- define "bucketserve.selector" -}}
app.kubernetes.io/name: bucketserve
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "bucketserve.labels" -}}
{{ include "bucketserve.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "bucketserve.image" -}}
{{- $image := .root.Values.image -}}
{{- if $image.registry }}{{ $image.registry }}/{{ end }}{{ $image.prefix }}-{{ .component }}:{{ $image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "bucketserve.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (include "bucketserve.fullname" .) }}
{{- else }}{{ .Values.serviceAccount.name | default "default" }}{{ end }}
{{- end }}

{{- define "bucketserve.redisUrl" -}}
{{- if .Values.redis.enabled }}redis://{{ include "bucketserve.fullname" . }}-redis:6379/0
{{- else }}{{ required "redis.url is needed when redis.enabled is false" .Values.redis.url }}{{ end }}
{{- end }}

{{- /* The served models, as JSON: name to source. */ -}}
{{- define "bucketserve.models" -}}
{{- $models := dict -}}
{{- $pools := .Values.pools | default (dict "" dict) -}}
{{- range $pools -}}
{{- $model := .model | default $.Values.model -}}
{{- if ne (get $models $model.name | default $model.source) $model.source -}}
{{- fail (printf "pools of model %s have two sources: %s and %s" $model.name (get $models $model.name) $model.source) -}}
{{- end -}}
{{- $_ := set $models $model.name $model.source -}}
{{- end -}}
{{- toJson $models -}}
{{- end }}

{{- /* What pods are of a pool: .selector beside what all pods of a component have. */ -}}
{{- define "bucketserve.poolSelector" -}}
{{ include "bucketserve.selector" . }}
{{- range $name, $value := .selector }}
{{ $name }}: {{ $value }}
{{- end }}
{{- end }}

{{- /* The variables of a service: .env, what all have, and over these what extraEnv sets; each name once. */ -}}
{{- define "bucketserve.env" -}}
{{- $telemetry := .root.Values.telemetry -}}
{{- $endpoint := $telemetry.otlpEndpoint -}}
{{- if and (not $endpoint) .root.Values.jaeger.enabled }}{{ $endpoint = printf "http://%s-jaeger:4317" (include "bucketserve.fullname" .root) }}{{ end -}}
{{- $all := dict
  "BUCKETSERVE_DEPLOYMENT_NAME" (printf "%s.%s" .root.Release.Namespace (include "bucketserve.fullname" .root) | trunc 64)
  "BUCKETSERVE_TELEMETRY_OTLP_ENDPOINT" $endpoint
  "BUCKETSERVE_TELEMETRY_SAMPLE_RATIO" $telemetry.sampleRatio
  "BUCKETSERVE_TELEMETRY_LOG_LEVEL" $telemetry.logLevel
  "BUCKETSERVE_TELEMETRY_LOG_FORMAT" "json" -}}
{{- with .root.Values.tls }}
{{- if .existingSecret }}
{{- $_ := mergeOverwrite $all (dict
  "BUCKETSERVE_TLS_CA_FILE" "/etc/bucketserve/tls/ca.crt"
  "BUCKETSERVE_TLS_CERT_FILE" "/etc/bucketserve/tls/tls.crt"
  "BUCKETSERVE_TLS_KEY_FILE" "/etc/bucketserve/tls/tls.key"
  "BUCKETSERVE_TLS_PEER_NAME" .peerName) }}
{{- with .metrics }}{{ $_ := set $all "BUCKETSERVE_TLS_METRICS" . }}{{ end }}
{{- else if or .clientCaSecret .metrics }}{{ fail "tls.clientCaSecret and tls.metrics need tls.existingSecret" }}
{{- end }}
{{- if and .clientCaSecret (eq $.component "gateway") }}
{{- $_ := set $all "BUCKETSERVE_TLS_CLIENT_CA_FILE" "/etc/bucketserve/client-ca/ca.crt" }}
{{- end }}
{{- end }}
{{- if and .root.Values.auth.existingSecret (eq .component "gateway") }}
{{- $_ := set $all "BUCKETSERVE_GATEWAY_KEYS_FILE" "/etc/bucketserve/keys/keys.toml" }}
{{- end }}
{{- range $name, $value := mergeOverwrite $all .env .values.extraEnv }}
- { name: {{ $name }}, value: {{ $value | toString | quote }} }
{{- end }}
- name: BUCKETSERVE_DEPLOYMENT_TOKEN
  valueFrom: { secretKeyRef: { name: {{ include "bucketserve.tokenSecret" .root }}, key: token } }
{{- end }}

{{- define "bucketserve.tokenSecret" -}}
{{ .Values.deployment.existingSecret | default (printf "%s-deployment" (include "bucketserve.fullname" .)) }}
{{- end }}

{{- define "bucketserve.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end }}

{{- /* What every pod of ours has: who it runs as, where it may run, how long it may take to go. */ -}}
{{- define "bucketserve.podSpec" -}}
serviceAccountName: {{ include "bucketserve.serviceAccountName" .root }}
automountServiceAccountToken: false
# They would put variables into the pods whose names begin as our settings do.
enableServiceLinks: false
securityContext: {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
# Draining, then flushing; Kubernetes kills after it.
terminationGracePeriodSeconds: {{ add (.values.drainSeconds | default 0) 35 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  - { name: tmp, emptyDir: {} }
  {{- range $volume, $secret := include "bucketserve.secrets" . | fromYaml }}
  - { name: {{ $volume }}, secret: { secretName: {{ $secret }} } }
  {{- end }}
  {{- if and .root.Values.model.existingClaim (ne .component "scheduler") }}
  - name: models
    persistentVolumeClaim: { claimName: {{ .root.Values.model.existingClaim }}, readOnly: true }
  {{- end }}
{{- end }}

{{- /* Secrets that a pod reads as files, of which the kubelet keeps what they hold now: name of the volume to secret. */ -}}
{{- define "bucketserve.secrets" -}}
{{- with .root.Values.tls.existingSecret }}
tls: {{ . }}
{{- end }}
{{- if eq .component "gateway" }}
{{- with .root.Values.tls.clientCaSecret }}
client-ca: {{ . }}
{{- end }}
{{- with .root.Values.auth.existingSecret }}
keys: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- /* A probe of .port; the kubelet's own speaks no TLS. */ -}}
{{- define "bucketserve.probe" -}}
{{- if .root.Values.tls.existingSecret -}}
exec: { command: [python, -m, bucketserve.probe, "127.0.0.1:{{ .port }}"] }, timeoutSeconds: 5
{{- else -}}
grpc: { port: {{ .port }} }
{{- end }}
{{- end }}

{{- define "bucketserve.mounts" -}}
- { name: tmp, mountPath: /tmp }
{{- range $volume, $secret := include "bucketserve.secrets" . | fromYaml }}
- { name: {{ $volume }}, mountPath: /etc/bucketserve/{{ $volume }}, readOnly: true }
{{- end }}
{{- if and .root.Values.model.existingClaim (ne .component "scheduler") }}
- { name: models, mountPath: /models, readOnly: true }
{{- end }}
{{- end }}

{{- define "bucketserve.pdb" -}}
{{- if .values.podDisruptionBudget.enabled }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "bucketserve.fullname" .root }}-{{ .component }}{{ .suffix }}
  labels: {{- include "bucketserve.labels" . | nindent 4 }}
spec:
  minAvailable: {{ .values.podDisruptionBudget.minAvailable }}
  selector:
    matchLabels: {{- include "bucketserve.poolSelector" . | nindent 6 }}
{{- end }}
{{- end }}

{{/* host:port of every scheduler pod, comma-separated. */}}
{{- define "bucketserve.schedulers" -}}
{{- $name := include "bucketserve.fullname" . -}}
{{- range $i := until (int .Values.scheduler.replicas) -}}
{{- if $i }},{{ end }}{{ $name }}-scheduler-{{ $i }}.{{ $name }}-scheduler:50052
{{- end -}}
{{- end }}
